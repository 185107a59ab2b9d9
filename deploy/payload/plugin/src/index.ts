// The Payload plugin: add `plugins: [movieqPlugin({ url, apiKey, webhookSecret })]` to your Payload config.
import type { BasePayload, CollectionConfig, Config, Field, Plugin } from 'payload'
import { Movieq } from './client.js'
import { endpoints } from './endpoints.js'
import type { MovieqOptions } from './options.js'
import { sceneFields, startAndStop, STATUSES, stopDeleted } from './scenes.js'

export { Movieq, MovieqError } from './client.js'
export type * from './client.js'
export { mediaData } from './endpoints.js'
export { sceneTask, type MovieqOptions, type Reference, type Scene, type Task } from './options.js'

/** Add to a collection the fields, hooks and endpoints that render its documents as clips. */
export function movieqPlugin(options: MovieqOptions): Plugin {
  return (config: Config): Config => {
    const slug = options.collection ?? 'scenes'
    const client = new Movieq(options)
    let found = false
    const collections = (config.collections ?? []).map((each) => {
      if (each.slug !== slug) return each
      found = true
      return withMovieq(each, client, options)
    })
    if (!found) throw new Error(`movieqPlugin: the collection ${slug} does not exist; name yours with { collection: ... }`)
    return {
      ...config,
      collections,
      endpoints: [...(config.endpoints ?? []), ...endpoints(client, options)],
      custom: { ...config.custom, movieq: client }, // Payload does not send `custom` to browsers
    }
  }
}

/** Return the movieq client of an app that uses the plugin. */
export function movieqOf(payload: BasePayload): Movieq {
  return payload.config.custom.movieq as Movieq
}

function withMovieq(collection: CollectionConfig, client: Movieq, options: MovieqOptions): CollectionConfig {
  const status = collection.fields.find((field) => 'name' in field && field.name === 'status')
  if (status) checkStatus(collection.slug, status)
  const taken = new Set(collection.fields.flatMap((field) => ('name' in field ? [field.name] : [])))
  const added = sceneFields(options, taken)
  const [panel, rest] = [added.filter((field) => field.type === 'ui'), added.filter((field) => field.type !== 'ui')]
  const { afterChange = [], afterDelete = [], ...hooks } = collection.hooks ?? {}
  return {
    ...collection,
    fields: [...panel, ...collection.fields, ...rest],
    hooks: {
      ...hooks,
      afterChange: [...afterChange, startAndStop(client, options)],
      afterDelete: [...afterDelete, stopDeleted(client)],
    },
  }
}

function checkStatus(slug: string, field: Field): void {
  const values = field.type === 'select' ? field.options.map((each) => (typeof each === 'string' ? each : each.value)) : []
  const missing = STATUSES.filter((each) => !values.includes(each))
  if (missing.length > 0) throw new Error(`movieqPlugin: the field status of ${slug} must be a select; add the options ${missing.join(', ')}`)
}
