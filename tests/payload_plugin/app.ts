// What an app written in TypeScript does with the plugin: it must pass the compiler with the types that are packed.
import { Movieq, movieqOf, movieqPlugin, sceneTask, type Receipt, type WebhookEvent } from 'movieq-payload'
import { buildConfig, type BasePayload } from 'payload'

export const plugin = movieqPlugin({
  url: process.env.MOVIEQ_URL,
  apiKey: process.env.MOVIEQ_API_KEY,
  webhookSecret: process.env.MOVIEQ_WEBHOOK_SECRET,
  collection: 'shots',
  project: (scene) => `film-${scene.id}`,
  task: async (scene, reference) => ({ ...(await sceneTask(scene, reference)), priority: 1 }),
  mediaData: (state) => ({ alt: state.task_id }),
})
export const config = (parts: Omit<Parameters<typeof buildConfig>[0], 'plugins'>) => buildConfig({ ...parts, plugins: [plugin] })

export async function voice(payload: BasePayload): Promise<Receipt> {
  return movieqOf(payload).submit({ project_id: 'film', task_type: 'process_audio', task_data: { text: 'Hello' } }, 'line-1')
}
export function told(client: Movieq, body: string, headers: Headers): string {
  const event: WebhookEvent = client.verify(body, headers)
  return event.type === 'task.completed' ? (event.result?.media_url ?? '') : (event.error ?? '')
}
// @ts-expect-error  there is no such option
movieqPlugin({ url: '', apiKey: '', key: '' })
// @ts-expect-error  1, 2 or 3
movieqPlugin({ url: '', apiKey: '', task: () => ({ task_type: 'generate_image', task_data: {}, priority: 4 }) })
