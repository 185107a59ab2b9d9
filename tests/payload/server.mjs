// A real Payload, headless: node:http in front of its own handleEndpoints(). Prints one line of JSON when it takes requests.
process.env.DISABLE_PAYLOAD_HMR = "true"; // which would look for a Next.js beside it

import http from "node:http";
import { Readable } from "node:stream";

const { getPayload, handleEndpoints } = await import("payload");
const config = await (await import("./payload.config.mjs")).default;
const payload = await getPayload({ config });

async function answer(req, res) {
  const asked = new Request(`http://${req.headers.host}${req.url}`, {
    method: req.method,
    headers: Object.entries(req.headers).filter(([name]) => !["connection", "keep-alive", "transfer-encoding"].includes(name)),
    ...(["GET", "HEAD"].includes(req.method) ? {} : { body: Readable.toWeb(req), duplex: "half" }),
  });
  const answered = await handleEndpoints({ config, request: asked });
  res.writeHead(answered.status, Object.fromEntries(answered.headers));
  if (answered.body) Readable.fromWeb(answered.body).pipe(res);
  else res.end();
}

let busy = 0; // requests in hand: also of clients that have gone
const server = http.createServer((req, res) => {
  if (req.url === "/busy") return res.end(String(busy));
  busy += 1;
  answer(req, res)
    .catch((error) => {
      payload.logger.error(error);
      res.destroy();
    })
    .finally(() => (busy -= 1));
});
server.listen(Number(process.env.PORT), "127.0.0.1", () => console.log(JSON.stringify({ ready: server.address().port })));
