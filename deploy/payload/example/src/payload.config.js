// A film platform in little: projects, their scenes with storyboards, and the media that comes of them.
import fs from 'node:fs'
import path from 'node:path'
import { sqliteAdapter } from '@payloadcms/db-sqlite'
import { movieqPlugin } from 'movieq-payload'
import { buildConfig } from 'payload'

const { PAYLOAD_DATA_DIR, PAYLOAD_SECRET, PAYLOAD_URL, MOVIEQ_URL, MOVIEQ_API_KEY, MOVIEQ_WEBHOOK_SECRET, MOVIEQ_IMPORT } = process.env
const dataDir = path.resolve(/* turbopackIgnore: true */ PAYLOAD_DATA_DIR || 'data')
fs.mkdirSync(dataDir, { recursive: true })
const loggedIn = ({ req }) => Boolean(req.user)

export default buildConfig({
  secret: PAYLOAD_SECRET || 'of the example alone: give a real one',
  serverURL: PAYLOAD_URL || 'http://localhost:3000',
  telemetry: false,
  admin: { avatar: 'default' },
  graphQL: { disable: true },
  typescript: { autoGenerate: false },
  db: sqliteAdapter({ client: { url: `file:${path.join(dataDir, 'payload.db')}` } }),
  // clips are larger than Payload's own limit of 20 MiB
  upload: { limits: { fileSize: 1024 ** 3 }, requestSizeLimit: 1024 ** 3 + 1024 ** 2 },
  collections: [
    { slug: 'users', auth: { useAPIKey: true }, fields: [{ name: 'name', type: 'text' }] },
    {
      slug: 'projects',
      admin: { useAsTitle: 'title' },
      fields: [{ name: 'title', type: 'text', required: true }],
    },
    {
      slug: 'scenes',
      admin: { useAsTitle: 'title', defaultColumns: ['title', 'project', 'status', 'updatedAt'] },
      fields: [
        { name: 'title', type: 'text', required: true },
        { name: 'description', type: 'textarea' },
        { name: 'storyboard', type: 'upload', relationTo: 'media', hasMany: true },
        {
          type: 'row',
          fields: [
            { name: 'cameraAngle', type: 'text', label: 'Camera' },
            { name: 'lighting', type: 'text' },
            { name: 'duration', type: 'number', min: 1, max: 30, defaultValue: 7, admin: { description: 'Seconds' } },
            { name: 'resolution', type: 'select', defaultValue: '1280x720', options: ['640x360', '1280x720', '1920x1080'] },
          ],
        },
        { name: 'audioCues', type: 'text', hasMany: true, label: 'Sounds' },
        { name: 'project', type: 'relationship', relationTo: 'projects', admin: { position: 'sidebar' } },
      ],
    },
    {
      slug: 'media',
      access: { read: loggedIn },
      upload: { staticDir: path.join(dataDir, 'media'), mimeTypes: ['image/*', 'video/*', 'audio/*'] },
      fields: [
        { name: 'alt', type: 'text', required: true },
        { name: 'project', type: 'relationship', relationTo: 'projects' },
        { name: 'mediaType', type: 'select', options: ['video_segment', 'character_design', 'audio_clip'] },
        { name: 'agentGenerated', type: 'checkbox' },
        { name: 'generationMetadata', type: 'json' },
        { name: 'technicalData', type: 'json' },
      ],
    },
  ],
  plugins: [
    movieqPlugin({
      url: MOVIEQ_URL || 'http://127.0.0.1:8001',
      apiKey: MOVIEQ_API_KEY,
      webhookSecret: MOVIEQ_WEBHOOK_SECRET,
      importMedia: MOVIEQ_IMPORT !== 'no', // no: movieq writes results here by itself (MOVIEQ_PAYLOAD_URL)
    }),
  ],
})
