-- The GPU time of tasks, projects and the installation.
-- include: time counters record

-- Stores the run's GPU time so far (ms), added to that of earlier runs, and its share of a GPU from now on.
local function meter(t, ms, share)
  if not t.gpu_share then set(t, {gpu_before_ms = t.gpu_ms or 0}) end
  set(t, {gpu_ms = string.format('%.3f', t.gpu_before_ms + ms), gpu_share = share, gpu_at_ms = now})
end

-- When a run ends: adds the GPU time since its last report, and counts its GPU time for the project and the installation.
local function bill(t)
  if not t.gpu_share then return end
  set(t, {gpu_ms = string.format('%.3f', t.gpu_ms + (now - t.gpu_at_ms) * t.gpu_share), gpu_at_ms = now})
  local ms = t.gpu_ms - (t.gpu_billed_ms or 0)
  if ms > 0 then
    for _, owner in ipairs({t.project_id, ''}) do count(K.gpu_ms, owner, string.format('%.3f', ms)) end
    set(t, {gpu_billed_ms = t.gpu_ms})
  end
end
