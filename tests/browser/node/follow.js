// Prints the id of each event of a stream that has one, and ends when the client holds the stream to be over.
import { EventSource } from "eventsource";

const [url, ...types] = process.argv.slice(2);
const awake = setInterval(() => {}, 1000); // the client alone does not keep the process while it waits to connect again
const source = new EventSource(url);
for (const type of types) {
  source.addEventListener(type, (event) => console.log(event.lastEventId));
}
source.onerror = (event) => {
  if (source.readyState !== EventSource.CLOSED) return;
  process.exitCode = event.code === 204 ? 0 : 1;
  clearInterval(awake);
};
