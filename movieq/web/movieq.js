// Follows tasks and projects of movieq in a browser. An ES module without dependencies; the types are in movieq.d.ts.
//
// An EventSource reconnects by itself after a broken connection, and continues at the last id that it saw. It gives up for good at any answer
// but 200, also at the 502 of a proxy whose API restarts. Then a new one is made here, after a while, with that id as `?after=`: so nothing of
// the log is missed, and nothing is told twice. What has no id (previews, a project's progress) is told to whoever is there.

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 30_000;
const ASKING_MS = 30_000;
const FINAL = new Set([400, 401, 403, 404]);
const ENDS = ["completed", "failed", "cancelled"];
const CHANGES = ["queued", "started", "retrying", ...ENDS, "updated"];

/** Follows a task by its `events_url` to its end. */
export function watchTask(url, { after = null, onProgress, onPreview, onDone, onUpdate, onGap, onError } = {}) {
  let snapshot = null; // what is told up to its last_event_id was before it
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
      // a failure from before a retry is no end
      if (isHistory(id) && (event.status !== snapshot.status || event.attempt !== snapshot.attempt)) return;
      stream.close();
      onDone?.(event);
    });
  }
  stream.open();
  return stream;
}

/** Follows all tasks of a project by its `events_url`, until it is closed. */
export function watchProject(url, { after = null, onSnapshot, onChange, onProgress, onGap, onError } = {}) {
  const stream = new Stream(url, after, onError);
  stream.on("snapshot", (event) => {
    stream.continueAfter(event.last_event_id); // what was before it is not told
    onSnapshot?.(event);
  });
  for (const type of CHANGES) stream.on(type, (event) => onChange?.(event));
  stream.on("progress", (event) => onProgress?.(event));
  stream.on("gap", (event) => onGap?.(event));
  stream.open();
  return stream;
}

/** What is followed. `lastEventId` is where another page would continue, as its `after`. */
class Stream {
  #url;
  #onError;
  #listeners = new Map();
  #source = null;
  #timer = null;
  #asking = null;
  #waitMs = FIRST_WAIT_MS;
  #placed = true; // whether the EventSource would continue at lastEventId

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

  /** Where to continue, though no event had this id. */
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
        // an event without an id comes with that of the last which had one
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

  /** Nothing is told any more. */
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
    const waitMs = this.#waitMs * (0.5 + Math.random()); // so that not all of them come at once
    this.#waitMs = Math.min(this.#waitMs * 2, LONGEST_WAIT_MS);
    this.#timer = setTimeout(() => this.#again(), waitMs);
  }

  // An EventSource does not say what the answer was: an address that has expired is refused for ever, a proxy's 502 passes.
  async #again() {
    const asking = (this.#asking = new AbortController());
    const limit = setTimeout(() => asking.abort(), ASKING_MS);
    let status = 0;
    try {
      const answer = await fetch(this.#continued(), { signal: asking.signal, cache: "no-store" });
      status = answer.status;
      // only movieq's own word is final: a proxy that has no backend may say 404 too
      const refusal = FINAL.has(status) ? await answer.json().catch(() => null) : null;
      if (!this.closed && typeof refusal?.error === "string") {
        this.close();
        this.#onError?.({ status, error: refusal.error, message: refusal.message });
      }
    } catch {
      // away, or closed meanwhile
    } finally {
      clearTimeout(limit);
      asking.abort();
    }
    if (this.closed) return;
    if (status === 204) this.lastEventId = null; // the end was told to somebody else: from the beginning, for its sake
    if (status === 200 || status === 204) this.open();
    else this.#failed();
  }
}

function isAfter(id, other) {
  const [ms, sequence] = id.split("-").map(Number);
  const [otherMs, otherSequence] = other.split("-").map(Number);
  return ms > otherMs || (ms === otherMs && sequence > otherSequence);
}
