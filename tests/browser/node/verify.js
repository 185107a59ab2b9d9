// Reads [{secret, headers, body}] and prints for each whether the official library of Standard Webhooks takes it for genuine.
import { readFileSync } from "node:fs";
import { Webhook } from "standardwebhooks";

function genuine({ secret, headers, body }) {
  try {
    new Webhook(secret).verify(body, headers);
    return true;
  } catch {
    return false;
  }
}

console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(genuine)));
