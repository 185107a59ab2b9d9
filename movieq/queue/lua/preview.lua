#!lua flags=allow-oom
-- Shows what a run is making.
-- args: task_id run image
--   image: a data url
-- Returns 'ok', or 'lost' where the run is not the present one.
-- Publishes `preview` to those who watch the task, not to those of the project, and appends nothing. Cost: O(1).
local t = load(task_id)
if not present(t, run) then return 'lost' end
publish(task_id, '>' .. now, 'preview',
  '{"task_id":' .. json(task_id) .. ',"project_id":' .. json(t.project_id) .. ',"type":"preview","time":"' .. rfc3339(now) .. '","attempt":' .. t.attempt
  .. ',"image":"' .. image .. '"}')
return 'ok'
