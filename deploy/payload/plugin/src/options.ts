import type { PayloadRequest, TypeWithID } from 'payload'
import type { ClientOptions, TaskState } from './client.js'

/** A document of the collection that has the fields of movieq. */
export type Scene = TypeWithID & Record<string, unknown>

/** Stands for a picture or a sound of the CMS in `task_data`: by its document or its id. */
export type Reference = (media: unknown) => Promise<string>

export interface Task {
  task_type: string
  task_data: Record<string, unknown>
  priority?: 1 | 2 | 3
}

export interface MovieqOptions extends ClientOptions {
  /**
   * Where movieq finds `/api/movieq/webhook`; by default under Payload's `serverURL`. Without either, or without a secret, movieq is not asked
   * to call: a scene is up to date as soon as somebody looks at its page.
   */
  callbackUrl?: string
  /** What is made into clips: `scenes`. */
  collection?: string
  /** The upload collection of results and storyboards: `media`. */
  media?: string
  /**
   * Whether results are fetched from movieq and stored here. Leave it out where movieq writes them itself (MOVIEQ_PAYLOAD_URL): there would
   * be two of each.
   */
  importMedia?: boolean
  /** The movieq project of a scene: 1 to 100 letters, digits, `-` and `_`. By default the id of its `project`. */
  project?: (scene: Scene) => string
  /** What to make of a scene; by default `sceneTask`. */
  task?: (scene: Scene, reference: Reference, req: PayloadRequest) => Task | Promise<Task>
  /** The fields of an imported document beside its file; by default those that movieq writes. */
  mediaData?: (state: TaskState, scene: Scene) => Record<string, unknown>
}

/** The id behind a relation, whether it was read with its document or not. */
export function idOf(relation: unknown): string | number | null {
  const id = typeof relation === 'object' && relation !== null ? (relation as { id?: unknown }).id : relation
  return typeof id === 'string' || typeof id === 'number' ? id : null
}

export function projectOf(options: MovieqOptions, scene: Scene): string {
  return options.project?.(scene) ?? String(idOf(scene.project) ?? 'payload')
}

/** A clip from the fields of these names that the scene has: its words, and the pictures of its storyboard in their order. */
export async function sceneTask(scene: Scene, reference: Reference): Promise<Task> {
  const text = (...names: string[]) => names.map((name) => scene[name]).find((value) => typeof value === 'string' && value.trim() !== '')
  const list = (value: unknown): unknown[] => (Array.isArray(value) ? value : value === null || value === undefined ? [] : [value])
  const images = []
  for (const each of list(scene.storyboard)) images.push(await reference(each))
  const found = {
    scene_description: text('description', 'prompt', 'title'),
    storyboard_images: images,
    camera_angle: text('cameraAngle'),
    lighting: text('lighting'),
    audio_cues: list(scene.audioCues),
    duration: scene.duration,
    resolution: text('resolution'),
    preview: true,
  }
  const given = Object.entries(found).filter(([, value]) => value !== undefined && value !== null && !(Array.isArray(value) && value.length === 0))
  return { task_type: 'generate_video', task_data: Object.fromEntries(given) }
}
