// Types of movieq.js, with the fields that a page usually needs. The API's OpenAPI document describes all fields of an event.

export interface TaskEvent {
  task_id: string;
  project_id: string;
  task_type: string;
  status: "queued" | "processing" | "completed" | "failed" | "cancelled";
  /** From 0 to 1. */
  progress: number;
  current_step: string;
  /** Seconds; null if unknown. */
  estimated_remaining: number | null;
  /** Seconds of GPU time of all its runs; only in the snapshot. */
  gpu_seconds?: number;
  /** What was ignored or changed; only in the snapshot. */
  warnings?: string[];
  [field: string]: unknown;
}

export interface Ended extends TaskEvent {
  result?: { media_url: string; [field: string]: unknown };
  error?: string;
  error_code?: string;
}

export interface Preview {
  /** A data URL of a JPEG. */
  image: string;
  [field: string]: unknown;
}

/** The log was trimmed and some events are lost; a snapshot follows. */
export interface Gap {
  after: string;
  first: string | null;
  last: string | null;
  [field: string]: unknown;
}

/**
 * The stream is refused for good: the task is gone (`not_found`), or the URL was changed (`invalid_signature`) or has expired (`expired`).
 * After `expired`, fetch a fresh `events_url` and watch again with `after: lastEventId`, or give the watch a `renew` that does so.
 */
export interface Refused {
  status: number;
  /** The error code; empty if another server than movieq answered. */
  error: string;
  message: string;
}

export interface Watching {
  /** The id of the last event; pass it as `after` to continue in another watch. */
  readonly lastEventId: string | null;
  readonly closed: boolean;
  close(): void;
}

interface Common {
  /** The id of the last event already seen. */
  after?: string | null;
  /** Called when the URL has expired: return a fresh `events_url`, for example from the task's status. Without one, `onError` is called. */
  renew?(): string | URL | null | Promise<string | URL | null>;
  onGap?(gap: Gap): void;
  /** Called once, at the end of the watch: no other try can help. After answers such as 429 and 503 the watch tries again by itself. */
  onError?(refused: Refused): void;
}

export interface TaskHandlers extends Common {
  /** Called with the snapshot (unless the watch continues after an id) and with each change until the end. */
  onProgress?(event: TaskEvent): void;
  onPreview?(preview: Preview): void;
  /** Called once: the task is completed, failed or cancelled. */
  onDone?(event: Ended): void;
  /** The result of an ended task was updated, for example with the id of its document in the CMS. */
  onUpdate?(event: Ended): void;
}

export interface ProjectHandlers extends Common {
  /** The project's running and queued tasks, at the start and after a gap. */
  onSnapshot?(snapshot: Record<string, unknown>): void;
  /** A task's state has changed. */
  onChange?(event: TaskEvent): void;
  onProgress?(event: TaskEvent): void;
}

/** Follow a task by its `events_url` until it ends. */
export function watchTask(url: string | URL, handlers?: TaskHandlers): Watching;

/** Follow all tasks of a project by its `events_url` until the watch is closed. */
export function watchProject(url: string | URL, handlers?: ProjectHandlers): Watching;
