import type { PayloadRequest, TypeWithID } from 'payload'
import type { ClientOptions, TaskState } from './client.js'

/** A document of the collection to which the plugin adds its fields. */
export type Scene = TypeWithID & Record<string, unknown>

/** Returns the URL to use in `task_data` for a picture or sound of the CMS, given its document or id. */
export type Reference = (media: unknown) => Promise<string>

export interface Task {
  task_type: string
  task_data: Record<string, unknown>
  priority?: 1 | 2 | 3
}

export interface MovieqOptions extends ClientOptions {
  /**
   * The URL of `/api/movieq/webhook` as movieq reaches it; by default under Payload's `serverURL`. Without either, or without `webhookSecret`,
   * movieq sends no webhooks, and a scene is updated only when its page is opened.
   */
  callbackUrl?: string
  /** The collection to render as clips; by default `scenes`. */
  collection?: string
  /** The upload collection of results and storyboards; by default `media`. */
  media?: string
  /**
   * Whether to download results from movieq and store them here. Leave it out if movieq writes to the CMS itself (MOVIEQ_PAYLOAD_URL);
   * otherwise each result would be stored twice.
   */
  importMedia?: boolean
  /** The movieq project of a scene: 1 to 100 letters, digits, `-` and `_`. By default the id of its `project`. */
  project?: (scene: Scene) => string
  /** Returns the task to submit for a scene; by default `sceneTask`. */
  task?: (scene: Scene, reference: Reference, req: PayloadRequest) => Task | Promise<Task>
  /** Returns the fields of an imported document; by default those that movieq writes itself. */
  mediaData?: (state: TaskState, scene: Scene) => Record<string, unknown>
}

/** Return the id of a relation, whether it holds the document or only the id. */
export function idOf(relation: unknown): string | number | null {
  const id = typeof relation === 'object' && relation !== null ? (relation as { id?: unknown }).id : relation
  return typeof id === 'string' || typeof id === 'number' ? id : null
}

export function projectOf(options: MovieqOptions, scene: Scene): string {
  return options.project?.(scene) ?? String(idOf(scene.project) ?? 'payload')
}

/** Return a `generate_video` task from the scene's text fields and, in order, the pictures of its storyboard. */
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
