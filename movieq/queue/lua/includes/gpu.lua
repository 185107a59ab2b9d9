-- The GPU time of tasks, projects and the installation.
-- include: time counters record

-- Notes what the run has used of a GPU so far (ms), and its share of one from now on; the time of earlier runs is added.
local function meter(t, ms, share)
  if not t.gpu_share then set(t, {gpu_before_ms = t.gpu_ms or 0}) end
  set(t, {gpu_ms = string.format('%.3f', t.gpu_before_ms + ms), gpu_share = share, gpu_at_ms = now})
end

-- Adds the time since the run's last report when it ends, and counts it for the project and the installation.
local function bill(t)
  if not t.gpu_share then return end
  set(t, {gpu_ms = string.format('%.3f', t.gpu_ms + (now - t.gpu_at_ms) * t.gpu_share), gpu_at_ms = now})
  local ms = t.gpu_ms - (t.gpu_billed_ms or 0)
  if ms > 0 then
    for _, owner in ipairs({t.project_id, ''}) do count(K.gpu_ms, owner, string.format('%.3f', ms)) end
    set(t, {gpu_billed_ms = t.gpu_ms})
  end
end
