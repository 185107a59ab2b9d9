// A server-side client of movieq's API: submit, status, cancel, retry, uploads, and verification of webhooks.
//
// Each call has a time limit and returns an answer or throws a MovieqError with a readable message. The API key is sent only in a header of
// these calls; a browser gets the signed `events_url` instead. Calls are not retried: to retry a submit, give it an idempotency key.
import { Webhook, WebhookVerificationError } from 'standardwebhooks'

const CALL_MS = 10_000
const UPLOAD_MS = 120_000
const ALLOWED_TYPES = /^(image|audio)\//

export type TaskStatus = 'queued' | 'processing' | 'completed' | 'failed' | 'cancelled'

export interface Submit {
  project_id: string
  task_type: string
  task_data: Record<string, unknown>
  priority?: 1 | 2 | 3
  callback_url?: string
  metadata?: Record<string, unknown>
  deadline?: { start_by?: string; finish_by?: string }
}

export interface Receipt {
  task_id: string
  status: 'queued'
  project_id: string
  estimated_duration: number
  queue_position: number
  created_at: string
  events_url: string
  status_url: string
  warnings: string[]
}

export interface Result {
  media_url: string
  /** The document that movieq has created in the CMS; null if no CMS is configured or the document does not exist yet. */
  payload_media_id: string | number | null
  media: { url: string; media_type: string; content_type: string; file_size: number; poster_url?: string | null }[]
  metadata: Record<string, unknown>
}

/** The state of a task, as in its status and in its webhooks. */
export interface TaskState {
  task_id: string
  project_id: string
  task_type: string
  status: TaskStatus
  result: Result | null
  error: string | null
  error_code: string | null
  processing_time: number | null
}

export interface Status extends TaskState {
  progress: number
  current_step: string
  retryable: boolean | null
  created_at: string
  started_at: string | null
  completed_at: string | null
  attempt: number
  queue_position: number | null
  estimated_remaining: number | null
  /** What was ignored or changed: the warnings of the receipt, then those of the result. */
  warnings: string[]
  events_url: string
}

export interface WebhookEvent extends TaskState {
  type: 'task.completed' | 'task.failed' | 'task.cancelled' | 'task.updated'
  /** When the event happened, not when it was sent: the later of two events counts, in whatever order they arrive. */
  timestamp: string
  metadata: Record<string, unknown>
}

/** An error with a readable message. `status` is the HTTP status; 503 without an answer. */
export class MovieqError extends Error {
  override name = 'MovieqError'
  constructor(
    message: string,
    readonly status: number,
    /** movieq's error code, or `unreachable`, `not_configured`, `bad_signature`. */
    readonly code: string,
    readonly retryable: boolean,
  ) {
    super(message)
  }
}

export interface ClientOptions {
  /** The API's URL, without /api/v1. */
  url: string | undefined
  apiKey: string | undefined
  /** `whsec_...`; two, separated by a comma, during a rotation. */
  webhookSecret?: string | undefined
}

export class Movieq {
  readonly #options: ClientOptions

  constructor(options: ClientOptions) {
    this.#options = options
  }

  /** Whether webhooks can be verified. */
  get verifies(): boolean {
    return Boolean(this.#options.webhookSecret?.trim())
  }

  /** Submit a task. A repeated submit with the same idempotency key and body returns the first receipt. */
  submit(task: Submit, idempotencyKey?: string): Promise<Receipt> {
    const headers = idempotencyKey ? { 'Idempotency-Key': idempotencyKey } : undefined
    return this.#call('POST', '/tasks/submit', { body: JSON.stringify(task), type: 'application/json', headers })
  }

  status(taskId: string): Promise<Status> {
    return this.#call('GET', `/tasks/${encodeURIComponent(taskId)}/status`)
  }

  /** Cancel a task; cancelling it again has no effect. */
  async cancel(taskId: string): Promise<void> {
    await this.#call('DELETE', `/tasks/${encodeURIComponent(taskId)}/cancel`)
  }

  /** Queue a failed task again with the same parameters. */
  retry(taskId: string): Promise<Receipt> {
    return this.#call('POST', `/tasks/${encodeURIComponent(taskId)}/retry`)
  }

  /** Upload an image or sound, stored for a week; return the URL to use in `task_data` of the same project. */
  async upload(projectId: string, bytes: Uint8Array<ArrayBuffer>, type: string): Promise<string> {
    const path = `/projects/${encodeURIComponent(projectId)}/uploads`
    const content = ALLOWED_TYPES.test(type) ? type : 'application/octet-stream'
    return (await this.#call<{ url: string }>('POST', path, { body: bytes, type: content, timeoutMs: UPLOAD_MS })).url
  }

  /** Verify a webhook's signature and time (Standard Webhooks); return its event. Throws MovieqError with status 401 or 503. */
  verify(body: string, headers: Headers): WebhookEvent {
    const secrets = (this.#options.webhookSecret ?? '').split(',').map((each) => each.trim()).filter(Boolean)
    if (secrets.length === 0) {
      throw new MovieqError('webhooks are not accepted: set webhookSecret in the options of movieqPlugin', 503, 'not_configured', false)
    }
    const signed = Object.fromEntries(['webhook-id', 'webhook-timestamp', 'webhook-signature'].map((name) => [name, headers.get(name) ?? '']))
    let problem = ''
    for (const secret of secrets) {
      try {
        return new Webhook(secret).verify(body, signed) as WebhookEvent
      } catch (error) {
        if (!(error instanceof WebhookVerificationError)) throw error
        problem = error.message
      }
    }
    throw new MovieqError(`Invalid webhook: ${problem}`, 401, 'bad_signature', false)
  }

  async #call<T>(method: string, path: string, sent: Sent = {}): Promise<T> {
    const { url, apiKey } = this.#options
    if (!url || !apiKey) {
      throw new MovieqError('movieq is not configured: set url and apiKey in the options of movieqPlugin', 503, 'not_configured', false)
    }
    const address = new URL(`/api/v1${path}`, url)
    let answer: Response
    let body: unknown
    try {
      answer = await fetch(address, {
        method,
        headers: { 'X-API-Key': apiKey, ...(sent.type ? { 'Content-Type': sent.type } : {}), ...sent.headers },
        redirect: 'error', // the key must not be sent to another address
        signal: AbortSignal.timeout(sent.timeoutMs ?? CALL_MS),
        ...(sent.body === undefined ? {} : { body: sent.body }),
      })
      body = await answer.json()
    } catch (error) {
      throw new MovieqError(`movieq at ${address.origin} cannot be reached: ${reason(error)}`, 503, 'unreachable', true)
    }
    if (answer.ok) return body as T
    const { error = 'internal', message = `HTTP status ${answer.status}`, retryable = false, errors = [] } = (body ?? {}) as Partial<Refusal>
    const told = errors.length > 1 ? errors.map((each) => `${each.path}: ${each.message}`).join('; ') : message
    throw new MovieqError(`movieq refused the request: ${told}`, answer.status, error, retryable)
  }
}

interface Sent {
  body?: string | Uint8Array<ArrayBuffer>
  type?: string
  headers?: Record<string, string> | undefined
  timeoutMs?: number
}

interface Refusal {
  error: string
  message: string
  retryable: boolean
  errors: { path: string; message: string }[]
}

function reason(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  if (error.name === 'TimeoutError') return 'it did not answer in time'
  if (error instanceof SyntaxError) return 'the server there is not movieq'
  const code = (error.cause as { code?: string } | undefined)?.code
  const known: Record<string, string> = { ECONNREFUSED: 'no server listens there', ENOTFOUND: 'unknown host name', ECONNRESET: 'it closed the connection' }
  return (code && (known[code] ?? code)) || error.message
}
