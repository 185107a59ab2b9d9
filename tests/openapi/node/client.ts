// What a client does with the types of openapi-typescript. "./request.ts" holds the request of the README.
import type { components, operations, webhooks } from "./api.d.ts";
import { request } from "./request.ts";

type Schemas = components["schemas"];
type Submit = operations["submit_task"];

async function submit(body: Submit["requestBody"]["content"]["application/json"]): Promise<Schemas["Receipt"]> {
  const answer = await fetch("/api/v1/tasks/submit", { method: "POST", body: JSON.stringify(body) });
  if (answer.status === 429) {
    const refused: Submit["responses"][429]["content"]["application/json"] = await answer.json();
    const code: "queue_full" | "quota_exceeded" | "rate_limited" = refused.error;
    throw new Error(`${code}: ${refused.message}`);
  }
  return answer.json();
}

const receipt = await submit(request);
console.log(receipt.task_id.length, receipt.queue_position.toFixed(), receipt.warnings.join());
await submit({
  project_id: "film",
  task_type: "process_audio",
  task_data: { text: "Light the lamp!", duration: null, a_field_that_an_engine_reads: [1] },
  metadata: { scene: { id: 12 } },
});
// @ts-expect-error  there is no such task type
await submit({ project_id: "film", task_type: "make_coffee", task_data: {} });
// @ts-expect-error  task_data is missing
await submit({ project_id: "film", task_type: "generate_image" });
// @ts-expect-error  the duration is a number
await submit({ project_id: "film", task_type: "generate_video", task_data: { duration: "long" } });

export function onWebhook(body: webhooks["task_ended"]["post"]["requestBody"]["content"]["application/json"]): string {
  if (body.status === "failed") return `${body.error_code}: ${body.error}`;
  const seed: unknown = body.result?.metadata["seed"];
  return `${body.metadata["scene_id"]} ${body.result?.media_url ?? body.cancelled_at ?? body.type} ${body.result?.media[0]?.width ?? 0} ${seed}`;
}

export function onEvent(event: Schemas["TaskEvent"]): number {
  switch (event.event) {
    case "snapshot": {
      const snapshot: Schemas["Snapshot"] = JSON.parse(event.data);
      return snapshot.progress;
    }
    case "retrying": {
      const retrying: Schemas["Retrying"] = JSON.parse(event.data);
      return retrying.retry_in;
    }
    default:
      return event.data.length;
  }
}

const query: operations["list_tasks"]["parameters"]["query"] = { status: "completed", limit: 10 };
console.log(query.page ?? 1);
