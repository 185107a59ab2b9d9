// What a scene has of movieq: its fields, and the hook that starts and stops its task.
//
// An editor sets the status to queued (start, or start anew), to draft, or, while a task runs, to cancelled; the rest movieq writes. What
// an outdated page sends along is dropped, so that it can neither stop nor double what runs.
import { createHash } from 'node:crypto'
import fs from 'node:fs/promises'
import path from 'node:path'
import type { CollectionAfterChangeHook, CollectionAfterDeleteHook, Field, FieldAccess, PayloadRequest } from 'payload'
import { MovieqError, type Movieq } from './client.js'
import { idOf, projectOf, type MovieqOptions, type Reference, type Scene, sceneTask } from './options.js'

export const STATUSES = ['draft', 'queued', 'processing', 'completed', 'failed', 'cancelled'] as const
const UPLOAD_KEPT_MS = 6 * 24 * 3600 * 1000 // movieq keeps one for seven days
const UPLOADS_KNOWN = 1000

export const isRunning = (status: unknown) => status === 'queued' || status === 'processing'

const mayChange: FieldAccess = ({ data, doc }) => {
  const from: unknown = doc?.status ?? 'draft'
  const to: unknown = data?.status === undefined ? from : data.status
  return to === from || (isRunning(from) ? to === 'cancelled' : to === 'queued' || to === 'draft')
}
const byMovieq = { create: () => false, update: () => false }
// the key that movieq has here writes the result; a page never does
const byWriteBack: FieldAccess = ({ req }) => (req.user as { _strategy?: string } | null)?._strategy === 'api-key'

/** The fields of movieq, less those whose names the collection has already. */
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
      admin: { position: 'sidebar', isClearable: false, description: 'Saved as Queued, the scene is made into a clip; saved as Cancelled, that ends.' },
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
    // whoever has it can follow the task for a day
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

/** Writes to a scene what only movieq may. Its hooks run again, and see no change that asks for anything. */
export async function write(req: PayloadRequest, options: MovieqOptions, id: string | number, data: Record<string, unknown>): Promise<Scene> {
  const collection = options.collection ?? 'scenes'
  const context = req.context
  try {
    return (await req.payload.update({ collection, id, data, req, depth: 0, overrideAccess: true, context: { movieq: true } })) as Scene
  } finally {
    req.context = context // Payload has put ours into it, and the request may go on with other scenes
  }
}

/**
 * A scene saved as queued has a task, or is failed and says why; one saved as cancelled has none that runs. The save itself stands in any
 * case: nothing that an editor wrote is lost because movieq is away.
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

/** The task of a scene that was deleted does not run on. */
export function stopDeleted(movieq: Movieq): CollectionAfterDeleteHook {
  return async ({ doc, req }) => {
    if (!isRunning(doc.status) || !doc.taskId) return
    await movieq.cancel(doc.taskId).catch((error: unknown) => {
      req.payload.logger.warn({ msg: 'the task of a deleted scene goes on', scene: doc.id, problem: String(error) })
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
    // the same scene saved twice at once is one task; saved again after its task has ended, another
    const key = `payload-${createHash('sha256').update(JSON.stringify(body)).digest('hex')}`
    const receipt = await movieq.submit(body, key)
    return { ...empty, taskId: receipt.task_id, eventsUrl: receipt.events_url, result: null }
  } catch (error) {
    req.payload.logger.error({ err: error, msg: 'a scene was not submitted to movieq', scene: scene.id })
    return { ...empty, status: 'failed', error: `Not started: ${said(error)}` }
  }
}

async function stopped(movieq: Movieq, scene: Scene, before: unknown, req: PayloadRequest) {
  if (!scene.taskId) return { error: null }
  try {
    await movieq.cancel(String(scene.taskId))
    return { error: null }
  } catch (error) {
    req.payload.logger.error({ err: error, msg: 'a task was not cancelled', scene: scene.id })
    return { status: before, error: `Not cancelled: ${said(error)}` } // it runs on, and how it ends will be heard
  }
}

/** For the editor: what is known to go wrong in its own words, what is not without its details. */
export function said(error: unknown): string {
  return error instanceof MovieqError ? `${error.message}.` : 'something went wrong in the CMS; its log says what.'
}

function callback(movieq: Movieq, options: MovieqOptions, req: PayloadRequest): { callback_url?: string } {
  const { serverURL, routes } = req.payload.config
  const url = options.callbackUrl ?? (serverURL && `${serverURL}${routes.api}/movieq/webhook`) // the host of a request is anybody's word
  return url && movieq.verifies ? { callback_url: url } : {}
}

/** Pictures of the CMS as movieq can have them: public ones by their address, those that lie on this machine by an upload. */
class References {
  readonly #uploads = new Map<string, { url: Promise<string>; until: number }>()

  constructor(
    readonly movieq: Movieq,
    readonly options: MovieqOptions,
  ) {}

  async of(media: unknown, project: string, req: PayloadRequest): Promise<string> {
    const collection = this.options.media ?? 'media'
    const id = idOf(media)
    if (id === null) throw new MovieqError('a picture of the storyboard is gone', 400, 'input_unavailable', false)
    const doc = await req.payload.findByID({ collection, id, depth: 0, req, overrideAccess: !req.user, disableErrors: true })
    if (!doc?.filename) throw new MovieqError(`picture ${id} of the storyboard is gone`, 400, 'input_unavailable', false)
    const upload = req.payload.collections[collection]?.config.upload
    if (!upload?.staticDir || upload.disableLocalStorage) {
      if (typeof doc.url === 'string' && /^https?:/.test(doc.url)) return doc.url
      throw new MovieqError(`${doc.filename} has no public address: give the plugin a task of your own`, 400, 'input_unavailable', false)
    }
    const file = path.join(upload.staticDir, path.basename(String(doc.filename)))
    return this.#uploaded(`${project} ${collection} ${id} ${doc.updatedAt}`, async () => {
      const bytes = await fs.readFile(file).catch(() => null)
      if (!bytes) throw new MovieqError(`the file of ${doc.filename} is gone`, 400, 'input_unavailable', false)
      return this.movieq.upload(project, new Uint8Array(bytes), String(doc.mimeType))
    })
  }

  /** Each picture once, so that the same scene saved twice says the same. */
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
