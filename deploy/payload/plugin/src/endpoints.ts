// The two endpoints under /api/movieq: the webhook that reports the end of a task, and the current state of a scene, for its page.
//
// Both update the scene in the same way, and both may come late, early or twice. A state that is older than the scene's, or of a task that the
// scene no longer has, changes nothing.
import type { Endpoint, PayloadRequest } from 'payload'
import { MovieqError, type Movieq, type Status, type TaskState } from './client.js'
import { idOf, type MovieqOptions, type Scene } from './options.js'
import { isRunning, said, write } from './scenes.js'

const BODY_BYTES = 1024 * 1024
const IMPORT_MS = 5 * 60_000
const IMPORT_BYTES = 512 * 1024 * 1024
const EXTENSIONS: Record<string, string> = { 'video/mp4': 'mp4', 'image/jpeg': 'jpg', 'audio/mpeg': 'mp3', 'audio/x-wav': 'wav' }
const MEDIA_TYPES: Record<string, string> = { dialogue_audio: 'audio_clip' }

/** The state that a scene's page shows. */
export interface SceneState {
  taskId: string | null
  status: string
  progress: number
  error: string | null
  result: string | number | null
  updatedAt: string | null
  eventsUrl: string | null
  currentStep: string | null
  queuePosition: number | null
  remaining: number | null
  /** What movieq ignored or changed. */
  warnings: string[]
  media: { url: string; type: string; poster: string | null } | null
  /** Why the other fields may be out of date. */
  problem: string | null
}

export function endpoints(movieq: Movieq, options: MovieqOptions): Endpoint[] {
  const scenes = new Scenes(options)
  return [
    { path: '/movieq/webhook', method: 'post', handler: (req) => webhook(movieq, options, scenes, req) },
    { path: '/movieq/scenes/:id', method: 'get', handler: (req) => sceneState(movieq, options, scenes, req) },
  ]
}

async function webhook(movieq: Movieq, options: MovieqOptions, scenes: Scenes, req: PayloadRequest): Promise<Response> {
  let event
  try {
    event = movieq.verify(await bodyOf(req), req.headers)
  } catch (error) {
    if (error instanceof MovieqError) return answer(error.status, error.message)
    throw error
  }
  const about = event.metadata?.payload as { collection?: unknown; id?: unknown } | undefined
  const id = idOf(about?.id)
  if (about?.collection !== (options.collection ?? 'scenes') || id === null) return answer(200, 'ignored: not for a scene')
  try {
    switch (await scenes.apply(req, id, event, event.timestamp, event.metadata.after)) {
      case 'applied':
        return answer(200, 'scene updated')
      case 'known':
        return answer(200, 'no change')
      case 'early':
        return answer(409, 'the scene is being saved: send the webhook again')
      case 'gone':
        return answer(410, 'the scene no longer exists')
    }
  } catch (error) {
    req.payload.logger.error({ err: error, msg: 'a webhook of movieq could not be applied', scene: id, task: event.task_id })
    return answer(503, said(error)) // movieq sends it again
  }
}

/** Return a scene's state. While its task runs, ask movieq, so that the page is right even if no webhook arrives. */
async function sceneState(movieq: Movieq, options: MovieqOptions, scenes: Scenes, req: PayloadRequest): Promise<Response> {
  if (!req.user) return answer(401, 'you are not logged in: log in first')
  const id = String(req.routeParams?.id)
  const collection = options.collection ?? 'scenes'
  const scene = (await req.payload.findByID({ collection, id, depth: 0, req, overrideAccess: false, disableErrors: true })) as Scene | null
  if (!scene) return answer(404, 'the scene does not exist, or you may not read it')
  let now = scene
  let task: Status | null = null
  let problem: string | null = null
  try {
    if (scene.taskId && (isRunning(scene.status) || scene.status === 'completed')) task = await movieq.status(String(scene.taskId))
    if (task && isRunning(scene.status)) now = await follow(scenes, req, scene, task)
  } catch (error) {
    req.payload.logger.warn({ msg: 'the task of a scene could not be read', scene: id, problem: String(error) })
    // an ended scene does not need its task, which movieq deletes after a while
    if (isRunning(scene.status)) problem = said(error)
  }
  return Response.json({ ...(await shown(options, req, now, task)), problem }, { headers: { 'Cache-Control': 'no-store' } })
}

async function follow(scenes: Scenes, req: PayloadRequest, scene: Scene, task: Status): Promise<Scene> {
  if (task.completed_at !== null) await scenes.apply(req, scene.id, task, task.completed_at)
  else if (task.status !== scene.status) await scenes.move(req, scene.id, task)
  else return scene
  return (await scenes.read(req, scene.id)) ?? scene
}

async function shown(options: MovieqOptions, req: PayloadRequest, scene: Scene, task: Status | null): Promise<Omit<SceneState, 'problem'>> {
  const running = isRunning(scene.status)
  const made = task?.result?.media[0]
  const id = idOf(scene.result)
  const collection = options.media ?? 'media'
  const own = id === null ? null : await req.payload.findByID({ collection, id, depth: 0, req, overrideAccess: false, disableErrors: true })
  const poster = made?.poster_url ?? null
  const media =
    typeof own?.url === 'string'
      ? { url: own.url, type: String(own.mimeType), poster }
      : scene.status === 'completed' && made
        ? { url: made.url, type: made.content_type, poster }
        : null
  return {
    taskId: text(scene.taskId),
    status: String(scene.status),
    progress: running && task ? task.progress : Number(scene.progress ?? 0),
    error: text(scene.error),
    result: id,
    updatedAt: text(scene.updatedAt),
    eventsUrl: running ? (task?.events_url ?? text(scene.eventsUrl)) : null,
    currentStep: running ? (task?.current_step ?? null) : null,
    queuePosition: running ? (task?.queue_position ?? null) : null,
    remaining: running ? (task?.estimated_remaining ?? null) : null,
    warnings: task?.warnings ?? [],
    media,
  }
}

type Applied = 'applied' | 'known' | 'early' | 'gone'

/** Writes the states of tasks into scenes; the writes of one scene run one after the other. */
class Scenes {
  readonly #turns = new Map<string, Promise<unknown>>()

  constructor(readonly options: MovieqOptions) {}

  async read(req: PayloadRequest, id: string | number): Promise<Scene | null> {
    const collection = this.options.collection ?? 'scenes'
    return (await req.payload.findByID({ collection, id, depth: 0, req, overrideAccess: true, disableErrors: true })) as Scene | null
  }

  /** Write the end of a task. `after` is the task that the scene had when this one was submitted. */
  apply(req: PayloadRequest, id: string | number, state: TaskState, at: string, after?: unknown): Promise<Applied> {
    return this.#inTurn(id, () => this.#apply(req, id, state, at, after))
  }

  /** Set a running scene to its task's status. */
  move(req: PayloadRequest, id: string | number, task: Status): Promise<void> {
    return this.#inTurn(id, async () => {
      const scene = await this.read(req, id) // the task may have ended meanwhile
      if (scene?.taskId !== task.task_id || !isRunning(scene.status)) return
      await write(req, this.options, id, { status: task.status, eventsUrl: task.events_url })
    })
  }

  #inTurn<T>(id: string | number, work: () => Promise<T>): Promise<T> {
    const key = String(id)
    const turn = (this.#turns.get(key) ?? Promise.resolve()).catch(() => {}).then(work)
    this.#turns.set(key, turn)
    const done = () => {
      if (this.#turns.get(key) === turn) this.#turns.delete(key)
    }
    turn.then(done, done)
    return turn
  }

  async #apply(req: PayloadRequest, id: string | number, state: TaskState, at: string, after: unknown): Promise<Applied> {
    const scene = await this.read(req, id)
    if (!scene) return 'gone'
    if (scene.taskId !== state.task_id) {
      // a task can end before the save that submitted it is committed
      return after !== undefined && (scene.taskId ?? null) === after ? 'early' : 'known'
    }
    if (!isRunning(scene.status) && !isNews(scene, state, at)) return 'known'
    const result = state.status === 'completed' ? await this.#media(req, scene, state) : null
    await write(req, this.options, id, {
      status: state.status,
      error: state.status === 'failed' ? (state.error ?? 'The task failed.') : null,
      taskEventAt: at,
      ...(state.status === 'completed' ? { progress: 1 } : {}),
      ...(result === null ? {} : { result }),
    })
    return 'applied'
  }

  /** Return the document of the result: the one that movieq created, or, with `importMedia`, one created here from the file. */
  async #media(req: PayloadRequest, scene: Scene, state: TaskState): Promise<string | number | null> {
    if (state.result?.payload_media_id != null) return state.result.payload_media_id
    const made = state.result?.media[0]
    if (!this.options.importMedia || !made) return null
    const collection = this.options.media ?? 'media'
    const name = `${state.task_id}.${EXTENSIONS[made.content_type] ?? made.content_type.split('/')[1]}`
    const where = { filename: { equals: name } }
    const { docs } = await req.payload.find({ collection, where, limit: 1, depth: 0, req, overrideAccess: true })
    if (docs[0]) return docs[0].id // the webhook came twice, or the write after the import failed
    const data = await downloaded(made.url)
    const doc = await req.payload.create({
      collection,
      data: (this.options.mediaData ?? mediaData)(state, scene),
      file: { data, mimetype: made.content_type, name, size: data.length },
      depth: 0,
      req,
      overrideAccess: true,
    })
    return doc.id
  }
}

/** Whether the state is newer than the scene's, or of the same time but with a new document. */
function isNews(scene: Scene, state: TaskState, at: string): boolean {
  if (!scene.taskEventAt || scene.status === 'draft') return false
  const later = Date.parse(at) - Date.parse(String(scene.taskEventAt))
  const id = state.result?.payload_media_id ?? null
  return later > 0 || (later === 0 && id !== null && String(id) !== String(idOf(scene.result)))
}

/** Return the fields that movieq itself gives to a document it creates. */
export function mediaData(state: TaskState, scene: Scene): Record<string, unknown> {
  const { metadata = {}, media = [] } = state.result ?? {}
  const words = [scene.description, scene.prompt, scene.title].find((each) => typeof each === 'string' && each.trim() !== '')
  const kind = media[0]?.media_type ?? 'video_segment'
  return {
    alt: String(words ?? 'Rendered by movieq').slice(0, 120),
    project: idOf(scene.project),
    mediaType: MEDIA_TYPES[kind] ?? kind,
    agentGenerated: true,
    generationMetadata: {
      taskId: state.task_id,
      promptUsed: words ?? null,
      modelVersion: metadata.model ?? null,
      generationTime: state.processing_time,
      seed: metadata.seed ?? null,
    },
    technicalData: { duration: metadata.duration, resolution: metadata.resolution, fps: metadata.fps, sampleRate: metadata.sample_rate },
  }
}

async function downloaded(url: string): Promise<Buffer> {
  const chunks: Uint8Array[] = []
  let size = 0
  try {
    const answer = await fetch(url, { signal: AbortSignal.timeout(IMPORT_MS) })
    if (!answer.ok || !answer.body) throw new MovieqError(`movieq's file cannot be downloaded: its server answered ${answer.status}`, 503, 'storage', true)
    for await (const chunk of answer.body) {
      size += chunk.length
      if (size > IMPORT_BYTES) throw new MovieqError(`movieq's file is too large to import: over ${IMPORT_BYTES} bytes`, 503, 'storage', false)
      chunks.push(chunk)
    }
  } catch (error) {
    if (error instanceof MovieqError) throw error
    throw new MovieqError(`movieq's file cannot be downloaded: ${(error as Error).message}`, 503, 'storage', true)
  }
  return Buffer.concat(chunks)
}

async function bodyOf(req: PayloadRequest): Promise<string> {
  const chunks: Uint8Array[] = []
  let size = 0
  for await (const chunk of req.body ?? []) {
    size += chunk.length
    if (size > BODY_BYTES) throw new MovieqError(`the body is over ${BODY_BYTES} bytes`, 413, 'payload_too_large', false)
    chunks.push(chunk)
  }
  return Buffer.concat(chunks).toString('utf8')
}

const text = (value: unknown) => (typeof value === 'string' && value !== '' ? value : null)
const answer = (status: number, message: string) => Response.json({ message }, { status })
