/** A model in a worker: requests to it as promises. */

const STOP_MS = 2000; // then a call of the network counts as one that never ends

/** A request that was stopped. */
export class Stopped extends Error {}

export class Model {
  #worker;
  #id = 0;
  /** @type {{ id: number, resolve: Function, reject: Function, onRow: Function } | null} */
  #waiting = null;

  /**
   * Open a file.
   * @param {ArrayBuffer} bytes
   * @param {"wasm" | "webgpu"} engine
   */
  async open(bytes, engine) {
    this.#end(new Stopped());
    this.#worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.#worker.onmessage = ({ data }) => this.#receive(data);
    this.#worker.onerror = (event) => this.#end(new Error(event.message || "the worker could not be started"));
    this.opened = { bytes, engine };
    return this.#ask("open", { bytes, engine });
  }

  /** Draw samples; `onRow` is called with each message "row" of worker.js. */
  draw(count, options, onRow) {
    return this.#ask("draw", { count, options }, onRow);
  }

  /** Stop drawing; the promise of `draw` is rejected with `Stopped`. A network that never ends is ended. */
  async stop() {
    const { id } = this.#waiting ?? {};
    this.#worker.postMessage({ type: "stop" });
    await new Promise((resolve) => setTimeout(resolve, STOP_MS));
    if (id !== undefined && this.#waiting?.id === id) await this.open(this.opened.bytes, this.opened.engine);
  }

  #ask(type, request, onRow = () => {}) {
    const id = ++this.#id;
    return new Promise((resolve, reject) => {
      this.#waiting = { id, resolve, reject, onRow };
      this.#worker.postMessage({ type, id, ...request });
    });
  }

  #receive(message) {
    if (message.type === "row") return this.#waiting?.onRow(message);
    if (this.#waiting?.id !== message.id) return;
    const { resolve, reject } = this.#waiting;
    this.#waiting = null;
    if (message.type === "done") resolve(message.result);
    else reject(message.stopped ? new Stopped() : new Error(message.message));
  }

  #end(error) {
    this.#worker?.terminate();
    this.#waiting?.reject(error);
    this.#waiting = null;
  }
}
