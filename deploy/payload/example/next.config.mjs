import path from 'node:path'
import { withPayload } from '@payloadcms/next/withPayload'

const root = path.resolve(import.meta.dirname, '..') // where node_modules is, of the plugin and of this app
export default withPayload({ turbopack: { root }, outputFileTracingRoot: root })
