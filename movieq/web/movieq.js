// Follow movieq tasks and projects in a browser. An ES module without dependencies; its types are in movieq.d.ts.
//
// An EventSource reconnects by itself after a broken connection and continues after the last id it got. But it gives up for good at any answer
// other than 200, such as a proxy's 502 while the API restarts. This module then opens a new one after a wait, with that id as `?after=`, so no
// event of the log is missed or reported twice. Events without an id (previews, a project's progress) are live only: they can be missed.

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 30_000;
const ASKING_MS = 30_000;
const FINAL = new Set([400, 401, 403, 404]);
const ENDS = ["completed", "failed", "cancelled"];
const CHANGES = ["queued", "started", "retrying", ...ENDS, "updated"];

/** Follow a task by its `events_url` until it ends. */
export function watchTask(url, { after = null, onProgress, onPreview, onDone, onUpdate, onGap, onError } = {}) {
  let snapshot = null; // events up to its last_event_id are older than the snapshot
  const isHistory = (id) => snapshot?.last_event_id && id !== null && !isAfter(id, snapshot.last_event_id);
  const stream = new Stream(url, after, onError);
  stream.on("snapshot", (event) => {
    snapshot = event;
    onProgress?.(event);
  });
  for (const type of ["queued", "started", "retrying", "progress"]) {
    stream.on(type, (event, id) => {
      if (!isHistory(id)) onProgress?.(event);
    });
  }
  stream.on("preview", (event) => onPreview?.(event));
  stream.on("updated", (event) => onUpdate?.(event));
  stream.on("gap", (event) => onGap?.(event));
  for (const type of ENDS) {
    stream.on(type, (event, id) => {
      // a failure before a retry is not the end
      if (isHistory(id) && (event.status !== snapshot.status || event.attempt !== snapshot.attempt)) return;
      stream.close();
      onDone?.(event);
    });
  }
  stream.open();
  return stream;
}

/** Follow all tasks of a project by its `events_url` until the stream is closed. */
export function watchProject(url, { after = null, onSnapshot, onChange, onProgress, onGap, onError } = {}) {
  const stream = new Stream(url, after, onError);
  stream.on("snapshot", (event) => {
    stream.continueAfter(event.last_event_id); // skips the events before the snapshot
    onSnapshot?.(event);
  });
  for (const type of CHANGES) stream.on(type, (event) => onChange?.(event));
  stream.on("progress", (event) => onProgress?.(event));
  stream.on("gap", (event) => onGap?.(event));
  stream.open();
  return stream;
}

/** A followed stream. Another page can continue it with `lastEventId` as its `after`. */
class Stream {
  #url;
  #onError;
  #listeners = new Map();
  #source = null;
  #timer = null;
  #asking = null;
  #waitMs = FIRST_WAIT_MS;
  #placed = true; // whether the EventSource itself would continue after lastEventId

  constructor(url, after, onError) {
    this.#url = new URL(url, globalThis.location?.href);
    this.#onError = onError;
    this.lastEventId = after ?? this.#url.searchParams.get("after");
    this.#url.searchParams.delete("after");
    this.closed = false;
  }

  on(type, told) {
    this.#listeners.set(type, told);
  }

  /** Set the id to continue after, though no event of this stream had it. */
  continueAfter(id) {
    this.lastEventId = id;
    this.#placed = false;
  }

  open() {
    let seen = "";
    this.#source = new EventSource(this.#continued());
    this.#placed = true;
    this.#source.onopen = () => {
      this.#waitMs = FIRST_WAIT_MS;
    };
    this.#source.onerror = () => this.#failed();
    for (const [type, told] of this.#listeners) {
      this.#source.addEventListener(type, (message) => {
        if (this.closed) return;
        // the browser gives an event without an id the id of the last event that had one
        const id = message.lastEventId !== seen ? message.lastEventId : null;
        seen = message.lastEventId;
        if (id !== null) {
          this.lastEventId = id;
          this.#placed = true;
        }
        told(JSON.parse(message.data), id);
      });
    }
  }

  /** Stop: no handler is called any more. */
  close() {
    this.closed = true;
    this.#source?.close();
    this.#asking?.abort();
    clearTimeout(this.#timer);
  }

  #continued() {
    const url = new URL(this.#url);
    if (this.lastEventId !== null) url.searchParams.set("after", this.lastEventId);
    return url;
  }

  #failed() {
    if (this.closed || (this.#placed && this.#source.readyState !== EventSource.CLOSED)) return; // it reconnects by itself
    this.#source.close();
    const waitMs = this.#waitMs * (0.5 + Math.random()); // random, so that clients do not all reconnect at once
    this.#waitMs = Math.min(this.#waitMs * 2, LONGEST_WAIT_MS);
    this.#timer = setTimeout(() => this.#again(), waitMs);
  }

  // An EventSource does not report the answer's status, so ask: an expired URL is refused for ever, a proxy's 502 is temporary.
  async #again() {
    const asking = (this.#asking = new AbortController());
    const limit = setTimeout(() => asking.abort(), ASKING_MS);
    let status = 0;
    try {
      const answer = await fetch(this.#continued(), { signal: asking.signal, cache: "no-store" });
      status = answer.status;
      // only an error of movieq's own is final: a proxy without a backend may answer 404 too
      const refusal = FINAL.has(status) ? await answer.json().catch(() => null) : null;
      if (!this.closed && typeof refusal?.error === "string") {
        this.close();
        this.#onError?.({ status, error: refusal.error, message: refusal.message });
      }
    } catch {
      // the server is unavailable, or the stream was closed
    } finally {
      clearTimeout(limit);
      asking.abort();
    }
    if (this.closed) return;
    if (status === 204) this.lastEventId = null; // this id is past the end of the log: start over, to get the end
    if (status === 200 || status === 204) this.open();
    else this.#failed();
  }
}

function isAfter(id, other) {
  const [ms, sequence] = id.split("-").map(Number);
  const [otherMs, otherSequence] = other.split("-").map(Number);
  return ms > otherMs || (ms === otherMs && sequence > otherSequence);
}
