// Makes the tables of the database: Payload does that only outside production, and `next start` is production.
process.env.NODE_ENV = 'development'
process.env.DISABLE_PAYLOAD_HMR = 'true'
const { getPayload } = await import('payload')
const { default: config } = await import('./src/payload.config.js')
await getPayload({ config })
process.exit(0) // else the database's client stays
