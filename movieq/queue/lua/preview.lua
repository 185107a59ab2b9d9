#!lua flags=allow-oom
-- Publishes a preview of a run in progress to the watchers of its task.
-- args: task_id run image
--   task_id: of the task
--   run: the run token
--   image: a data URL
-- Returns 'ok'; 'lost' if the task does not belong to the run.
-- Publishes `preview` to the task's subscribers, not to the project's; appends nothing.
-- Cost: O(1).
-- include: time record messages fence
local t = load(task_id)
if not is_current(t, run) then return 'lost' end
publish(task_id, '>' .. now, 'preview',
  '{"task_id":' .. json(task_id) .. ',"project_id":' .. json(t.project_id) .. ',"type":"preview","time":"' .. rfc3339(now)
  .. '","attempt":' .. t.attempt .. ',"image":"' .. image .. '"}')
return 'ok'
