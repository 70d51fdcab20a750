/** A file or an argument that cannot be used. Its message is one line: what is wrong, and what is allowed. */
export class InputError extends Error {
  name = "InputError";
}

/**
 * A value for a message, cut to 60 characters.
 * @param {unknown} value
 */
export function shown(value) {
  const text = typeof value === "bigint" ? `${value}` : String(JSON.stringify(value) ?? value);
  return text.length <= 60 ? text : `${text.slice(0, 57)}...`;
}
