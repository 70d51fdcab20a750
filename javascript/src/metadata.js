/**
 * The metadata of an ONNX file, from the file itself: not every build of ONNX Runtime gives them.
 *
 * The file is a protobuf message ModelProto. Its fields 14 are the metadata, messages of a key (field 1) and a value
 * (field 2). Only the lengths of other fields are read.
 */

import { InputError } from "./errors.js";

const METADATA_FIELD = 14;
const LENGTH_DELIMITED = 2;

/**
 * Read the text entries of an ONNX file's metadata.
 * @param {Uint8Array} content the file
 * @returns {Map<string, string>}
 * @throws {InputError} the bytes are not a protobuf message, or an entry is not valid text
 */
export function readMetadata(content) {
  const text = new TextDecoder("utf-8", { fatal: true });
  /** @type {Map<string, string>} */
  const entries = new Map();
  for (const [field, entry] of fields(content)) {
    if (field !== METADATA_FIELD) continue;
    const pair = new Map(fields(entry));
    try {
      entries.set(text.decode(pair.get(1)), text.decode(pair.get(2)));
    } catch (error) {
      throw new InputError("the file's metadata is not valid text: export the model again", { cause: error });
    }
  }
  return entries;
}

/**
 * Numbers and contents of the length-delimited fields of a protobuf message.
 * @param {Uint8Array} message
 * @returns {Generator<[number, Uint8Array]>}
 */
function* fields(message) {
  let position = 0;
  const damaged = () => new InputError("this is not an ONNX file: give the sampler.onnx of a run");
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (position >= message.length || scale > 2 ** 63) throw damaged();
      const byte = message[position++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  /** Bytes of a field by its wire type; groups (3 and 4) do not occur in ONNX. */
  const size = (/** @type {number} */ wireType) => {
    if (wireType === LENGTH_DELIMITED) return varint();
    if (wireType === 1) return 8;
    if (wireType === 5) return 4;
    throw damaged();
  };
  while (position < message.length) {
    const tag = varint();
    const wireType = tag % 8;
    if (wireType === 0) {
      varint();
      continue;
    }
    const end = size(wireType) + position;
    if (end > message.length) throw damaged();
    if (wireType === LENGTH_DELIMITED) yield [Math.floor(tag / 8), message.subarray(position, end)];
    position = end;
  }
}
