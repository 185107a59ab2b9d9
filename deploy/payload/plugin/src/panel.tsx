'use client'

// The clip panel of a scene's page: a progress bar and previews while the clip is rendered, then the clip or the error.
//
// The panel asks the CMS, which asks movieq, for the state at the start and the end. Progress comes from movieq itself, by the signed events URL.
import { Button, useConfig, useDocumentInfo, useForm, useFormFields } from '@payloadcms/ui'
import { useEffect, useRef, useState, type ReactNode } from 'react'
import type { SceneState } from './endpoints.js'
import { watchTask, type TaskEvent, type Watching } from './movieq.js'

const AGAIN_MS = 3000
const ENDED_AGAIN_MS = 15_000
const ASKING_MS = 20_000
const WRITTEN = ['status', 'taskId', 'progress', 'error', 'result'] as const
const STEPS: Record<string, string> = { waiting_in_queue: 'Waiting', upload_complete: 'Done' }
const LABELS: Record<string, string> = {
  draft: 'Not rendered',
  queued: 'Waiting',
  processing: 'Rendering',
  completed: 'Ready',
  failed: 'Failed',
  cancelled: 'Stopped',
}

const isRunning = (status: unknown) => status === 'queued' || status === 'processing'

export function Panel(): ReactNode {
  const { id, data } = useDocumentInfo()
  const { submit } = useForm()
  const { state, live, preview, problem } = useScene()
  const status = live && isRunning(state?.status) ? live.status : (state?.status ?? String(data?.status ?? 'draft'))
  const running = isRunning(status)
  const save = (to: string) => void submit({ overrides: { status: to } })
  return (
    <section className="movieq-panel" aria-label="Clip">
      <style href="movieq-panel" precedence="medium">
        {STYLE}
      </style>
      <header>
        <h3>Clip</h3>
        <span className={`movieq-panel__chip movieq-panel__chip--${status}`} role="status">
          {LABELS[status] ?? status}
        </span>
        <span className="movieq-panel__actions">
          {running ? (
            <Button buttonStyle="secondary" size="small" margin={false} onClick={() => save('cancelled')}>
              Stop
            </Button>
          ) : (
            <Button buttonStyle="secondary" size="small" margin={false} onClick={() => save('queued')}>
              {status === 'failed' ? 'Try again' : status === 'completed' ? 'Render again' : 'Render'}
            </Button>
          )}
        </span>
      </header>
      {running && <Bar state={state} live={live} />}
      {running && preview && <img className="movieq-panel__picture" src={preview} alt="Preview" />}
      {!running && state?.media && <Media media={state.media} />}
      {state?.error && (
        <p className="movieq-panel__error" role="alert">
          {state.error}
        </p>
      )}
      {state && state.warnings.length > 0 && (
        <ul className="movieq-panel__warnings" aria-label="Warnings">
          {state.warnings.map((warning, index) => (
            <li key={index}>{warning}</li>
          ))}
        </ul>
      )}
      {problem && <p className="movieq-panel__problem">{problem}</p>}
      {id === undefined && <p className="movieq-panel__hint">The scene is saved first, then rendered.</p>}
    </section>
  )
}

function Bar({ state, live }: { state: SceneState | null; live: TaskEvent | null }): ReactNode {
  const percent = Math.floor((live?.progress ?? state?.progress ?? 0) * 100)
  const waiting = (live?.status ?? state?.status) === 'queued'
  const step = live?.current_step ?? state?.currentStep ?? 'waiting_in_queue'
  const left = live ? live.estimated_remaining : state?.remaining
  const place = waiting && state?.queuePosition ? `position ${state.queuePosition}` : null
  const said = [STEPS[step] ?? sentence(step), place ?? (left == null ? null : `about ${duration(left)} left`)]
  return (
    <div className="movieq-panel__run">
      <div
        className={`movieq-panel__bar${waiting ? ' movieq-panel__bar--waiting' : ''}`}
        role="progressbar"
        aria-label={STEPS[step] ?? sentence(step)}
        aria-valuemin={0}
        aria-valuemax={100}
        aria-valuenow={waiting ? undefined : percent}
      >
        <div style={{ width: `${waiting ? 100 : percent}%` }} />
      </div>
      <div className="movieq-panel__words">
        <span>{said.filter(Boolean).join(', ')}</span>
        {!waiting && <span>{percent} %</span>}
      </div>
    </div>
  )
}

function Media({ media }: { media: NonNullable<SceneState['media']> }): ReactNode {
  if (media.type.startsWith('video/')) {
    return <video key={media.url} className="movieq-panel__picture" src={media.url} poster={media.poster ?? undefined} controls preload="metadata" />
  }
  if (media.type.startsWith('audio/')) return <audio key={media.url} src={media.url} controls preload="metadata" />
  return <img className="movieq-panel__picture" src={media.url} alt="Result" />
}

interface Shown {
  state: SceneState | null
  live: TaskEvent | null
  preview: string | null
  problem: string | null
}

const NOTHING: Shown = { state: null, live: null, preview: null, problem: null }

/** Return the scene's state, updated as it changes. The form gets the values that movieq wrote, so that the next save does not undo them. */
function useScene(): Shown {
  const { id, data, setData } = useDocumentInfo()
  const { getFields, dispatchFields } = useForm()
  const { config } = useConfig()
  const [shown, setShown] = useState<Shown>(NOTHING)
  const formStatus = useFormFields(([fields]) => `${fields.status?.value} ${fields.status?.initialValue}`)
  const saved = useRef(data)
  saved.current = data
  const address = id === undefined ? null : `${config.serverURL}${config.routes.api}/movieq/scenes/${id}`
  const task = `${data?.taskId} ${isRunning(data?.status)} ${data?.error}`

  useEffect(() => {
    if (address === null) return
    let watching: Watching | null = null
    let timer: ReturnType<typeof setTimeout> | undefined
    const closing = new AbortController()

    /** Ask the CMS for the state, which it also updates from movieq's answer. Returns null if the CMS does not know it. */
    const look = async (): Promise<SceneState | null> => {
      const found = await ask(address, closing.signal)
      if (closing.signal.aborted) return null
      if (typeof found === 'string') {
        setShown((before) => ({ ...before, problem: found }))
        return null
      }
      setShown((before) => ({ state: found, live: isRunning(found.status) ? before.live : null, preview: before.preview, problem: found.problem }))
      return found
    }
    const follow = async (after: string | null): Promise<void> => {
      const found = await look()
      if (closing.signal.aborted || !isRunning(found?.status ?? saved.current?.status)) return
      if (found?.eventsUrl) watch(found.eventsUrl, found.status, after)
      else again(after)
    }
    const again = (after: string | null, waitMs = AGAIN_MS): void => {
      timer = setTimeout(() => void follow(after), waitMs)
    }
    const ended = async (): Promise<void> => {
      const found = await look()
      if (closing.signal.aborted || (found !== null && !isRunning(found.status))) return
      again(null, ENDED_AGAIN_MS) // the CMS has not stored the end yet, perhaps because it cannot download the file
    }
    const watch = (url: string, status: string, after: string | null): void => {
      watching = watchTask(url, {
        after,
        onProgress: (live) => {
          setShown((before) => ({ ...before, live, problem: null }))
          if (live.status === status) return
          status = live.status
          void look() // it started, or was queued again
        },
        onPreview: ({ image }) => setShown((before) => ({ ...before, preview: image })),
        onDone: () => void ended(),
        onError: () => again(watching?.lastEventId ?? null), // the URL has expired, say: get a fresh one from the CMS
      })
    }

    void follow(null)
    return () => {
      closing.abort()
      watching?.close()
      clearTimeout(timer)
    }
    // the other values are constant for the page
  }, [address, task]) // eslint-disable-line react-hooks/exhaustive-deps

  useEffect(() => {
    const found = shown.state
    const before = saved.current ?? {}
    if (found === null || String(found.updatedAt) < String(before.updatedAt)) return // a later save is newer
    const fields = getFields()
    for (const path of WRITTEN) {
      const field = fields[path]
      const chosen = path === 'status' && field?.value !== field?.initialValue // changed by the editor, not saved yet
      if (field && !chosen && (field.value ?? null) !== found[path]) {
        dispatchFields({ type: 'UPDATE', path, value: found[path], initialValue: found[path] })
      }
    }
    if (found.updatedAt !== before.updatedAt) {
      const { status, taskId, progress, error, result, updatedAt } = found
      setData({ ...before, status, taskId, progress, error, result, updatedAt }) // else Payload reports a change by another editor
    }
    // the answer to a save may put older values into the form: so run again whenever its status changes
  }, [shown.state, formStatus]) // eslint-disable-line react-hooks/exhaustive-deps
  return shown
}

/** Return the scene's state, or an error message. */
async function ask(address: string, closing: AbortSignal): Promise<SceneState | string> {
  try {
    const signal = AbortSignal.any([closing, AbortSignal.timeout(ASKING_MS)])
    const answer = await fetch(address, { credentials: 'include', cache: 'no-store', signal })
    const body = (await answer.json()) as SceneState & { message?: string }
    return answer.ok ? body : (body.message ?? `The CMS answered ${answer.status}.`)
  } catch {
    return 'The CMS does not answer.'
  }
}

function sentence(step: string): string {
  const words = step.replaceAll('_', ' ')
  return words.charAt(0).toUpperCase() + words.slice(1)
}

function duration(seconds: number): string {
  return seconds < 90 ? `${Math.max(1, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`
}

const STYLE = `
.movieq-panel { border: 1px solid var(--theme-elevation-150); border-radius: 4px; padding: 1rem; margin-bottom: 1.5rem; display: grid; gap: 0.75rem; }
.movieq-panel header { display: flex; align-items: center; gap: 0.75rem; }
.movieq-panel h3 { margin: 0; font-size: 1rem; }
.movieq-panel p { margin: 0; }
.movieq-panel__actions { margin-left: auto; }
.movieq-panel__chip { padding: 0.1rem 0.6rem; border-radius: 4px; background: var(--theme-elevation-100); }
.movieq-panel__chip--completed { background: var(--theme-success-100); color: var(--theme-success-800); }
.movieq-panel__chip--failed { background: var(--theme-error-100); color: var(--theme-error-800); }
.movieq-panel__bar { height: 8px; border-radius: 4px; overflow: hidden; background: var(--theme-elevation-100); }
.movieq-panel__bar > div { height: 100%; background: var(--theme-success-500); transition: width 0.4s linear; }
.movieq-panel__bar--waiting > div { background: var(--theme-elevation-250); transition: none; animation: movieq-panel-wait 1.6s ease-in-out infinite; }
@keyframes movieq-panel-wait { 50% { opacity: 0.35; } }
@media (prefers-reduced-motion: reduce) { .movieq-panel__bar > div { animation: none; transition: none; } }
.movieq-panel__words { display: flex; justify-content: space-between; margin-top: 0.35rem; font-variant-numeric: tabular-nums; }
.movieq-panel__picture { display: block; width: 100%; max-height: 60vh; object-fit: contain; background: #000; border-radius: 4px; }
.movieq-panel audio { width: 100%; }
.movieq-panel__error { padding: 0.6rem 0.8rem; border-left: 4px solid var(--theme-error-500); background: var(--theme-error-50); color: var(--theme-error-900); }
.movieq-panel__warnings { margin: 0; padding: 0.6rem 0.8rem 0.6rem 2rem; border-left: 4px solid var(--theme-warning-500); background: var(--theme-warning-50); color: var(--theme-warning-900); }
.movieq-panel__problem, .movieq-panel__hint { color: var(--theme-elevation-600); }
`
