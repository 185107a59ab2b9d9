// Follow movieq tasks and projects in a browser. An ES module without dependencies; its types are in movieq.d.ts.
//
// An EventSource reconnects by itself after a broken connection and continues after the last id it got. But it gives up for good at any answer
// other than 200, such as a proxy's 502 while the API restarts. This module then opens a new one after a wait, with that id as `?after=`, so no
// event of the log is missed or reported twice. Events without an id (previews, a project's progress) are live only: they can be missed.

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 30_000;
const ASKING_MS = 30_000;
const LONGEST_RETRY_AFTER_MS = 3_600_000;
const MAY_PASS = new Set([404, 408, 425, 429]); // of a proxy: it may have no backend at the moment
const ENDS = ["completed", "failed", "cancelled"];
const CHANGES = ["queued", "started", "retrying", ...ENDS, "updated"];

/** Follow a task by its `events_url` until it ends. */
export function watchTask(url, { after = null, renew, onProgress, onPreview, onDone, onUpdate, onGap, onError } = {}) {
  let snapshot = null; // events up to its last_event_id are older than the snapshot
  const isHistory = (id) => snapshot?.last_event_id && id !== null && !isAfter(id, snapshot.last_event_id);
  const stream = new Stream(url, after, renew, onError);
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
export function watchProject(url, { after = null, renew, onSnapshot, onChange, onProgress, onGap, onError } = {}) {
  const stream = new Stream(url, after, renew, onError);
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
  #renew;
  #renewed = false; // whether the URL is fresh and has not worked yet
  #onError;
  #listeners = new Map();
  #source = null;
  #timer = null;
  #asking = null;
  #waitMs = FIRST_WAIT_MS;
  #placed = true; // whether the EventSource itself would continue after lastEventId

  constructor(url, after, renew, onError) {
    this.#url = new URL(url, globalThis.location?.href);
    this.#renew = renew;
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
      this.#renewed = false;
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

  #failed(leastMs = 0) {
    if (this.closed || (this.#placed && this.#source.readyState !== EventSource.CLOSED)) return; // it reconnects by itself
    this.#source.close();
    const waitMs = leastMs + this.#waitMs * (0.5 + Math.random()); // random, so that clients do not all reconnect at once
    this.#waitMs = Math.min(this.#waitMs * 2, LONGEST_WAIT_MS);
    this.#timer = setTimeout(() => this.#again(), waitMs);
  }

  // An EventSource does not report the answer's status, so ask: some refusals are for ever, a proxy's 502 is temporary.
  async #again() {
    const asking = (this.#asking = new AbortController());
    const limit = setTimeout(() => asking.abort(), ASKING_MS);
    let answer = null;
    let refusal = null;
    try {
      answer = await fetch(this.#continued(), { signal: asking.signal, cache: "no-store" });
      if (!answer.ok) refusal = await refusalOf(answer);
    } catch {
      // the server is unavailable, or the stream was closed
    } finally {
      clearTimeout(limit);
      asking.abort();
    }
    if (this.closed) return;
    if (answer?.status === 204) this.lastEventId = null; // this id is past the end of the log: start over, to get the end
    if (answer?.ok) this.open();
    else if (refusal === null) this.#failed(retryAfterMs(answer));
    else if (refusal.error !== "expired" || !(await this.#refresh())) this.#giveUp(refusal);
  }

  /** Continue by a fresh URL. Return whether there is one. */
  async #refresh() {
    if (!this.#renew || this.#renewed) return false;
    try {
      const url = await this.#renew();
      if (!url) return false;
      this.#url = new URL(url, globalThis.location?.href);
      this.#url.searchParams.delete("after");
    } catch {
      return false;
    }
    this.#renewed = true;
    if (!this.closed) this.open();
    return true;
  }

  #giveUp(refusal) {
    if (this.closed) return;
    this.close();
    this.#onError?.(refusal);
  }
}

/** Return what an answer refuses for good; null if another try may help. */
async function refusalOf(answer) {
  const { status } = answer;
  const body = await answer.json().catch(() => null);
  if (typeof body?.error === "string") return body.retryable ? null : { status, error: body.error, message: body.message };
  const final = status >= 400 && status < 500 && !MAY_PASS.has(status);
  return final ? { status, error: "", message: `The server answered ${status}.` } : null;
}

/** Return the milliseconds of the header Retry-After; 0 without one. */
function retryAfterMs(answer) {
  const text = answer?.headers.get("Retry-After") ?? "0";
  const ms = /^\d+$/.test(text) ? Number(text) * 1000 : Date.parse(text) - Date.now();
  return Math.min(Math.max(ms || 0, 0), LONGEST_RETRY_AFTER_MS);
}

function isAfter(id, other) {
  const [ms, sequence] = id.split("-").map(Number);
  const [otherMs, otherSequence] = other.split("-").map(Number);
  return ms > otherMs || (ms === otherMs && sequence > otherSequence);
}
