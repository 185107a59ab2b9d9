// Types of movieq.js. What an event holds is said in the API's OpenAPI document; here are the fields that a page usually reads.

export interface TaskEvent {
  task_id: string;
  project_id: string;
  task_type: string;
  status: "queued" | "processing" | "completed" | "failed" | "cancelled";
  /** From 0 to 1. */
  progress: number;
  current_step: string;
  /** Seconds; null where it is not known. */
  estimated_remaining: number | null;
  /** How long its runs had a GPU, in seconds: in the state at first. */
  gpu_seconds?: number;
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

/** Part of the history is not in the log any more: a snapshot follows. */
export interface Gap {
  after: string;
  first: string | null;
  last: string | null;
  [field: string]: unknown;
}

/** The address is refused for good: it has expired, say. Fetch a fresh `events_url` and watch again with `after: lastEventId`. */
export interface Refused {
  status: number;
  error: string;
  message: string;
}

export interface Watching {
  /** The id after which another watch would continue. */
  readonly lastEventId: string | null;
  readonly closed: boolean;
  close(): void;
}

interface Common {
  /** An id to continue after. */
  after?: string | null;
  onGap?(gap: Gap): void;
  onError?(refused: Refused): void;
}

export interface TaskHandlers extends Common {
  /** The state at first (not where the watch continues after an id), and each change until the end. */
  onProgress?(event: TaskEvent): void;
  onPreview?(preview: Preview): void;
  /** Once: the task is completed, failed or cancelled. */
  onDone?(event: Ended): void;
  /** The task had ended, and its result has become more: the id of its document in the CMS, say. */
  onUpdate?(event: Ended): void;
}

export interface ProjectHandlers extends Common {
  /** The project's tasks that run and wait, at first and after a gap. */
  onSnapshot?(snapshot: Record<string, unknown>): void;
  /** A task's state has changed. */
  onChange?(event: TaskEvent): void;
  onProgress?(event: TaskEvent): void;
}

/** Follows a task by its `events_url` to its end. */
export function watchTask(url: string | URL, handlers?: TaskHandlers): Watching;

/** Follows all tasks of a project by its `events_url`, until it is closed. */
export function watchProject(url: string | URL, handlers?: ProjectHandlers): Watching;
