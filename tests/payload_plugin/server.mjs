// The example's Payload app without Next: node:http in front of Payload's own handleEndpoints(). Prints a line of JSON when it listens.
import http from 'node:http'
import { Readable } from 'node:stream'
import { getPayload, handleEndpoints } from 'payload'
import configPromise from './payload.config.js'

const config = await configPromise
const payload = await getPayload({ config })

const server = http.createServer(async (incoming, outgoing) => {
  try {
    const request = new Request(`http://${incoming.headers.host}${incoming.url}`, {
      method: incoming.method,
      headers: incoming.headers,
      ...(['GET', 'HEAD'].includes(incoming.method) ? {} : { body: Readable.toWeb(incoming), duplex: 'half' }),
    })
    const answer = await handleEndpoints({ config, request })
    outgoing.writeHead(answer.status, Object.fromEntries(answer.headers))
    outgoing.end(Buffer.from(await answer.arrayBuffer()))
  } catch (error) {
    payload.logger.error(error)
    outgoing.writeHead(500).end()
  }
})
server.listen(Number(process.env.PORT), '127.0.0.1', () => console.log(JSON.stringify({ ready: true })))
process.once('SIGTERM', () => process.exit(0))
