// What a page written in TypeScript does with movieq.js: it must pass the compiler with the declarations that movieq serves.
import { watchProject, watchTask, type Ended, type Watching } from "../../../movieq/web/movieq.js";

const watching: Watching = watchTask("https://movieq.example/api/v1/tasks/1/events?expires=1&signature=a", {
  after: null,
  onProgress: (event) => console.log(event.status === "processing", event.progress * 100, event.current_step.length),
  onPreview: (preview) => console.log(preview.image.length),
  onDone: (event: Ended) => console.log(event.result?.media_url.length ?? event.error_code),
  onGap: (gap) => console.log(gap.after),
  renew: async () => (await fetch("/fresh")).text(),
  onError: (refused) => console.log(refused.status.toFixed(), refused.error === "expired", refused.message),
});
watching.close();
const resumed = watchProject(new URL("https://movieq.example/api/v1/projects/film/events"), {
  after: watching.lastEventId,
  onSnapshot: (snapshot) => console.log(Object.keys(snapshot)),
  onChange: (event) => console.log(event.task_id, event.status),
});
// @ts-expect-error  it is told, not set
resumed.closed = true;
// @ts-expect-error  there is no such handler
watchTask("https://movieq.example", { onFinished: () => {} });
