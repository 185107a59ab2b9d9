// The fields that movieq adds to a scene, and the hooks that submit and cancel its task.
//
// An editor may set the status to queued (render, or render again), to draft, or, while a task runs, to cancelled; movieq writes everything
// else. Other values from an outdated page are dropped, so they can neither cancel a running task nor submit a second one.
import { createHash } from 'node:crypto'
import fs from 'node:fs/promises'
import path from 'node:path'
import type { CollectionAfterChangeHook, CollectionAfterDeleteHook, Field, FieldAccess, PayloadRequest } from 'payload'
import { MovieqError, type Movieq } from './client.js'
import { idOf, projectOf, type MovieqOptions, type Reference, type Scene, sceneTask } from './options.js'

export const STATUSES = ['draft', 'queued', 'processing', 'completed', 'failed', 'cancelled'] as const
const UPLOAD_KEPT_MS = 6 * 24 * 3600 * 1000 // movieq stores an upload for seven days
const UPLOADS_KNOWN = 1000

export const isRunning = (status: unknown) => status === 'queued' || status === 'processing'

const mayChange: FieldAccess = ({ data, doc }) => {
  const from: unknown = doc?.status ?? 'draft'
  const to: unknown = data?.status === undefined ? from : data.status
  return to === from || (isRunning(from) ? to === 'cancelled' : to === 'queued' || to === 'draft')
}
const byMovieq = { create: () => false, update: () => false }
// movieq writes the result with its API key of this CMS; a page never does
const byWriteBack: FieldAccess = ({ req }) => (req.user as { _strategy?: string } | null)?._strategy === 'api-key'

/** Return the fields of movieq, without those whose names the collection already uses. */
export function sceneFields(options: MovieqOptions, taken: Set<string>): Field[] {
  const sidebar = { position: 'sidebar', readOnly: true } as const
  const fields: (Field & { name: string })[] = [
    { name: 'movieq', type: 'ui', label: 'Clip', admin: { components: { Field: 'movieq-payload/panel#Panel' }, disableListColumn: true } },
    {
      name: 'status',
      type: 'select',
      defaultValue: 'draft',
      index: true,
      options: STATUSES.map((value) => ({ value, label: value.charAt(0).toUpperCase() + value.slice(1) })),
      access: { create: mayChange, update: mayChange },
      hooks: { beforeDuplicate: [() => 'draft'] },
      admin: { position: 'sidebar', isClearable: false, description: 'Save as Queued to render the scene, or as Cancelled to stop rendering.' },
    },
    { name: 'taskId', type: 'text', index: true, label: 'Task', access: byMovieq, admin: { ...sidebar, condition: has('taskId') } },
    { name: 'progress', type: 'number', min: 0, max: 1, access: byMovieq, admin: { ...sidebar, hidden: true } },
    { name: 'error', type: 'textarea', access: byMovieq, admin: { ...sidebar, hidden: true } },
    {
      name: 'result',
      type: 'upload',
      relationTo: options.media ?? 'media',
      access: { create: byWriteBack, update: byWriteBack },
      admin: { ...sidebar, condition: has('result') },
    },
    // hidden from the public: anyone with this URL can follow the task for a day
    {
      name: 'eventsUrl',
      type: 'text',
      access: { ...byMovieq, read: ({ req }) => Boolean(req.user) },
      admin: { hidden: true, disableListColumn: true, disableListFilter: true },
    },
    { name: 'taskEventAt', type: 'date', access: byMovieq, admin: { hidden: true, disableListColumn: true, disableListFilter: true } },
  ]
  return fields.filter((field) => !taken.has(field.name))
}

function has(name: string) {
  return (data: Record<string, unknown>) => Boolean(data[name])
}

/** Write fields of a scene that only movieq may write. The scene's hooks run again but have nothing to do. */
export async function write(req: PayloadRequest, options: MovieqOptions, id: string | number, data: Record<string, unknown>): Promise<Scene> {
  const collection = options.collection ?? 'scenes'
  const context = req.context
  try {
    return (await req.payload.update({ collection, id, data, req, depth: 0, overrideAccess: true, context: { movieq: true } })) as Scene
  } finally {
    req.context = context // Payload has put our context into the request, which may save other scenes too
  }
}

/**
 * Submit a task for a scene saved as queued, or set the scene to failed with the reason; cancel the task of one saved as cancelled. The save
 * itself always succeeds: an editor's work is not lost when movieq is unavailable.
 */
export function startAndStop(movieq: Movieq, options: MovieqOptions): CollectionAfterChangeHook {
  const references = new References(movieq, options)
  return async ({ doc, previousDoc, operation, req }) => {
    const scene = doc as Scene
    const before: unknown = operation === 'create' ? 'draft' : previousDoc?.status
    let written: Record<string, unknown>
    if (scene.status === 'queued' && !isRunning(before)) written = await started(movieq, options, references, scene, req)
    else if (scene.status === 'cancelled' && isRunning(before) && !req.context.movieq) written = await stopped(movieq, scene, before, req)
    else return doc
    const saved = await write(req, options, scene.id, written)
    return { ...doc, ...written, updatedAt: saved.updatedAt }
  }
}

/** Cancel the task of a deleted scene. */
export function stopDeleted(movieq: Movieq): CollectionAfterDeleteHook {
  return async ({ doc, req }) => {
    if (!isRunning(doc.status) || !doc.taskId) return
    await movieq.cancel(doc.taskId).catch((error: unknown) => {
      req.payload.logger.warn({ msg: 'the task of a deleted scene could not be cancelled', scene: doc.id, problem: String(error) })
    })
  }
}

async function started(movieq: Movieq, options: MovieqOptions, references: References, scene: Scene, req: PayloadRequest) {
  const empty = { progress: 0, error: null, taskEventAt: null, eventsUrl: null }
  try {
    const project_id = projectOf(options, scene)
    const reference: Reference = (media) => references.of(media, project_id, req)
    const task = await (options.task ?? sceneTask)(scene, reference, req)
    const body = {
      ...task,
      project_id,
      ...callback(movieq, options, req),
      metadata: {
        scene_id: String(scene.id),
        payload: { collection: options.collection ?? 'scenes', id: scene.id, field: 'result' },
        after: scene.taskId ?? null,
      },
    }
    // the idempotency key: two saves at once give one task, a save after the task has ended gives a new one
    const key = `payload-${createHash('sha256').update(JSON.stringify(body)).digest('hex')}`
    const receipt = await movieq.submit(body, key)
    return { ...empty, taskId: receipt.task_id, eventsUrl: receipt.events_url, result: null }
  } catch (error) {
    req.payload.logger.error({ err: error, msg: 'a scene could not be submitted to movieq', scene: scene.id })
    return { ...empty, status: 'failed', error: `Not started: ${said(error)}` }
  }
}

async function stopped(movieq: Movieq, scene: Scene, before: unknown, req: PayloadRequest) {
  if (!scene.taskId) return { error: null }
  try {
    await movieq.cancel(String(scene.taskId))
    return { error: null }
  } catch (error) {
    req.payload.logger.error({ err: error, msg: 'a task could not be cancelled', scene: scene.id })
    return { status: before, error: `Not cancelled: ${said(error)}` } // the task goes on, and its end will arrive
  }
}

/** Return an error message for the editor: movieq's message, or a general one that reveals no details. */
export function said(error: unknown): string {
  return error instanceof MovieqError ? `${error.message}.` : 'an error occurred in the CMS; see its log.'
}

function callback(movieq: Movieq, options: MovieqOptions, req: PayloadRequest): { callback_url?: string } {
  const { serverURL, routes } = req.payload.config
  const url = options.callbackUrl ?? (serverURL && `${serverURL}${routes.api}/movieq/webhook`) // not the request's host, which anyone can set
  return url && movieq.verifies ? { callback_url: url } : {}
}

/** URLs by which movieq gets pictures of the CMS: a public picture's own URL, or an upload of a file on this machine. */
class References {
  readonly #uploads = new Map<string, { url: Promise<string>; until: number }>()

  constructor(
    readonly movieq: Movieq,
    readonly options: MovieqOptions,
  ) {}

  async of(media: unknown, project: string, req: PayloadRequest): Promise<string> {
    const collection = this.options.media ?? 'media'
    const id = idOf(media)
    if (id === null) throw new MovieqError('a picture of the storyboard no longer exists', 400, 'input_unavailable', false)
    const doc = await req.payload.findByID({ collection, id, depth: 0, req, overrideAccess: !req.user, disableErrors: true })
    if (!doc?.filename) throw new MovieqError(`picture ${id} of the storyboard no longer exists`, 400, 'input_unavailable', false)
    const upload = req.payload.collections[collection]?.config.upload
    if (!upload?.staticDir || upload.disableLocalStorage) {
      if (typeof doc.url === 'string' && /^https?:/.test(doc.url)) return doc.url
      throw new MovieqError(`${doc.filename} has no public URL: give it one, or set the plugin's task option`, 400, 'input_unavailable', false)
    }
    const file = path.join(upload.staticDir, path.basename(String(doc.filename)))
    return this.#uploaded(`${project} ${collection} ${id} ${doc.updatedAt}`, async () => {
      const bytes = await fs.readFile(file).catch(() => null)
      if (!bytes) throw new MovieqError(`the file ${doc.filename} is missing on the CMS's disk`, 400, 'input_unavailable', false)
      return this.movieq.upload(project, new Uint8Array(bytes), String(doc.mimeType))
    })
  }

  /** Upload each picture once, so that two saves of a scene submit the same task. */
  #uploaded(key: string, upload: () => Promise<string>): Promise<string> {
    const known = this.#uploads.get(key)
    if (known && known.until > Date.now()) return known.url
    const url = upload()
    this.#uploads.set(key, { url, until: Date.now() + UPLOAD_KEPT_MS })
    url.catch(() => this.#uploads.delete(key))
    const oldest = this.#uploads.keys().next().value
    if (this.#uploads.size > UPLOADS_KNOWN && oldest !== undefined) this.#uploads.delete(oldest)
    return url
  }
}
