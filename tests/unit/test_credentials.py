"""Content Credentials: what a reader of C2PA finds in signed files of every format, and what it says of one that was changed since."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import c2pa
import msgspec
import numpy as np
import pytest
from PIL import Image

from movieq import __version__, credentials, settings
from movieq.checks import Mark
from movieq.credentials import Claim, Credentials
from movieq.errors import SettingsError, Unsigned
from movieq.local import doctor
from movieq.tasks.entities import Task
from movieq.tasks.states import GENERATE_IMAGE, Kind, ProjectId, TaskId, TaskStatus
from tests.certificates import HOLDER, Chain, chain
from tests.render.tagged import FORMATS, MODEL, PROMPT, REVISION, job, tags_of, write
from workers.child.media.metadata import file_tags
from workers.protocol import Done, Produced
from workers.provenance import Provenance, signed

TYPES = {
    "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp", "mp3": "audio/mpeg", "wav": "audio/wav", "flac": "audio/flac",
    "mp4": "video/mp4",
}  # fmt: skip
CLAIM = Claim("output.png", "trainedAlgorithmicMedia", "some-model", REVISION, {"task_id": "task-1", "seed": 7, "prompt": PROMPT})


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A chain of certificates."""
    return chain(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def signer(issued: Chain) -> Credentials:
    """Its credentials."""
    return loaded(issued)


def loaded(issued: Chain) -> Credentials:
    found = credentials.load(settings.load(issued.settings, Path("/nonexistent")))
    assert found is not None
    return found


class Read:
    """What a reader that trusts the root finds in a file."""

    def __init__(self, body: bytes, content_type: str, root: str) -> None:
        context = c2pa.Context.from_dict({"verify": {"verify_trust": True}, "trust": {"trust_anchors": root}})
        with c2pa.Reader(content_type, io.BytesIO(body), context=context) as reader:
            self.state = reader.get_validation_state()
            self.manifest: dict[str, Any] = reader.get_active_manifest()

    def assertion(self, label: str) -> Any:
        return next(each["data"] for each in self.manifest["assertions"] if each["label"] == label)

    @property
    def source(self) -> str:
        (created,) = self.assertion("c2pa.actions.v2")["actions"]
        assert created["action"] == "c2pa.created"
        return str(created["digitalSourceType"])


def example(folder: Path, kind: str) -> Path:
    """A file of this kind, with its tags."""
    path = folder / f"output.{kind}"
    write(path, kind, file_tags(job(folder, model=MODEL, prompt=PROMPT), "Image"))
    return path


def changed(body: bytes, before: bytes) -> bytes:
    """The signed file with one bit of its picture or sound turned."""
    half = len(before) // 2
    place = body.index(before[half : half + 24])
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]


def content(path: Path) -> Any:
    """The pixels or samples of a file."""
    if path.suffix in (".jpeg", ".png", ".webp"):
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray().ravel() for frame in container.decode(container.streams[0])])  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_reader_finds_who_made_a_file_of_any_format_and_by_what(tmp_path: Path, issued: Chain, signer: Credentials, kind: str) -> None:
    path = example(tmp_path, kind)
    before = content(path)
    signer.sign(path, TYPES[kind], CLAIM)
    read = Read(path.read_bytes(), TYPES[kind], issued.root)
    assert read.state == "Trusted"
    assert read.source == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert read.assertion("movieq.generation") == {"task_id": "task-1", "seed": 7, "prompt": PROMPT}
    generator = read.manifest["claim_generator_info"][0]
    assert (generator["name"], generator["version"]) == ("movieq", __version__)
    assert (read.manifest["title"], read.manifest["signature_info"]["common_name"]) == ("output.png", HOLDER)
    assert np.array_equal(content(path), before), "signing changes no pixel and no sample"
    assert tags_of(path)["revision"] == REVISION, "nor its tags"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_was_changed_after_it_was_signed_is_not_valid(tmp_path: Path, issued: Chain, signer: Credentials, kind: str) -> None:
    path = example(tmp_path, kind)
    before = path.read_bytes()
    signer.sign(path, TYPES[kind], CLAIM)
    body = path.read_bytes()
    assert Read(body, TYPES[kind], issued.root).state == "Trusted"
    assert Read(changed(body, before), TYPES[kind], issued.root).state == "Invalid"


def test_the_index_of_a_signed_clip_comes_first(tmp_path: Path, signer: Credentials) -> None:
    path = example(tmp_path, "mp4")
    signer.sign(path, "video/mp4", CLAIM)
    body = path.read_bytes()
    assert 0 < body.index(b"moov") < body.index(b"mdat")


def test_who_does_not_know_the_root_sees_that_nothing_was_changed_and_does_not_trust(tmp_path: Path, signer: Credentials) -> None:
    path = example(tmp_path, "png")
    signer.sign(path, "image/png", CLAIM)
    stranger = chain(tmp_path / "stranger")
    assert Read(path.read_bytes(), "image/png", stranger.root).state == "Valid"


@pytest.mark.parametrize("kind", ["es256", "es384", "ps256", "ed25519"])
def test_keys_of_every_usual_kind_sign(tmp_path: Path, kind: str) -> None:
    issued = chain(tmp_path / kind, kind=kind)
    path = example(tmp_path, "png")
    loaded(issued).sign(path, "image/png", CLAIM)
    read = Read(path.read_bytes(), "image/png", issued.root)
    assert (read.state, read.manifest["signature_info"]["alg"].lower()) == ("Trusted", kind)


def test_a_file_that_cannot_be_signed_stays_as_it_was(tmp_path: Path, signer: Credentials) -> None:
    path = tmp_path / "output.txt"
    path.write_text("a line")
    with pytest.raises(Unsigned, match=r"output\.png cannot be signed"):
        signer.sign(path, "text/plain", CLAIM)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("output.txt", "a line")]


def test_credentials_do_not_show_their_key(signer: Credentials) -> None:
    assert repr(signer) == f"Credentials({HOLDER!r})"


# ── Settings ──


def wrong(folder: Path, what: str) -> tuple[dict[str, str], str]:
    """Settings with which nothing can be signed, and what is said of them."""
    good = chain(folder / "good").settings
    (folder / "text").write_text("no PEM")
    match what:
        case "nothing, and required":
            return {"MOVIEQ_C2PA_REQUIRED": "1"}, "MOVIEQ_C2PA_REQUIRED is set: name a certificate"
        case "no key":
            return good | {"MOVIEQ_C2PA_KEY": ""}, "MOVIEQ_C2PA_KEY is not set"
        case "no certificate":
            return good | {"MOVIEQ_C2PA_CERTIFICATE": ""}, "MOVIEQ_C2PA_CERTIFICATE is not set"
        case "no file":
            return good | {"MOVIEQ_C2PA_CERTIFICATE": "/nonexistent"}, "MOVIEQ_C2PA_CERTIFICATE: /nonexistent is not a readable PEM"
        case "no PEM":
            return good | {"MOVIEQ_C2PA_KEY": str(folder / "text")}, "MOVIEQ_C2PA_KEY: .*text is not a readable PEM private key"
        case "another's key":
            return good | {"MOVIEQ_C2PA_KEY": str(chain(folder / "other").key)}, "is not the key of the first certificate"
        case "expired":
            return chain(folder / "other", days=0.5).settings, "expired on .*: renew it"
    return chain(folder / "other", signs=False).settings, "MOVIEQ_C2PA_CERTIFICATE: .* cannot sign"


@pytest.mark.parametrize(
    "what",
    ["nothing, and required", "no key", "no certificate", "no file", "no PEM", "another's key", "expired", "not for signing"],
)
def test_settings_with_which_nothing_can_be_signed_are_refused_by_name(tmp_path: Path, what: str) -> None:
    given, message = wrong(tmp_path, what)
    with pytest.raises(SettingsError, match=message):
        credentials.load(settings.load(given, tmp_path / "none"))


def test_without_a_certificate_nothing_is_signed() -> None:
    assert credentials.load(settings.Settings()) is None


@pytest.mark.parametrize(("days", "mark", "said"), [(90, Mark.GOOD, HOLDER), (20, Mark.NOTE, "renew it"), (0.5, Mark.BROKEN, "expired")])
def test_doctor_tries_the_certificate_and_says_how_long_it_holds(tmp_path: Path, days: float, mark: Mark, said: str) -> None:
    finding = doctor.signatures(settings.load(chain(tmp_path, days=days).settings, tmp_path / "none"))
    assert (finding.mark, said in finding.text) == (mark, True), finding


# ── A run's files ──


def task(**fields: Any) -> Task:
    return Task(
        task_id=TaskId("task-1"), project_id=ProjectId("film"), task_type=GENERATE_IMAGE, kind=Kind.GPU_HEAVY, engine="diffusers",
        model="some-model", shape="", status=TaskStatus.PROCESSING, priority=2, created_at_ms=0, estimate_ms=0, max_ms=0, **fields,
    )  # fmt: skip


def done(folder: Path, *kinds: str, source: str = "trainedAlgorithmicMedia") -> Done:
    """What a run made: a file of each kind."""
    files = tuple(Produced(str(example(folder, kind)), "output", TYPES[kind], seed=7) for kind in kinds)
    return Done("run", files, {"digital_source_type": source, "seed": 7, "revision": REVISION})


@pytest.mark.parametrize("source", ["trainedAlgorithmicMedia", "algorithmicMedia", "composite"])
async def test_every_file_of_a_run_is_signed_as_what_it_is(tmp_path: Path, issued: Chain, signer: Credentials, source: str) -> None:
    result = await signed(Provenance(credentials=signer), task(), PROMPT, done(tmp_path, "mp4", "jpeg", source=source))
    assert result.metadata["signed_by"] == HOLDER
    for file in result.files:
        read = Read(Path(file.path).read_bytes(), file.content_type, issued.root)
        assert (read.state, read.source.rpartition("/")[2]) == ("Trusted", source)
        assert read.assertion("movieq.generation") == {
            "task_id": "task-1", "task_type": "generate_image", "engine": "diffusers", "model": "some-model", "revision": REVISION,
            "seed": 7, "prompt": PROMPT,
        }  # fmt: skip


async def test_where_tags_are_off_the_claim_says_what_it_is_and_not_how_it_was_made(
    tmp_path: Path, issued: Chain, signer: Credentials
) -> None:
    write(tmp_path / "output.png", "png", file_tags(job(tmp_path, model=MODEL, prompt="Marrakesh", file_tags=False), "Image"))
    files = (Produced(str(tmp_path / "output.png"), "output", "image/png"),)
    run = Done("run", files, {"digital_source_type": "trainedAlgorithmicMedia", "seed": 7, "revision": REVISION})
    await signed(Provenance(tags=False, credentials=signer), task(), "Marrakesh", run)
    body = (tmp_path / "output.png").read_bytes()
    read = Read(body, "image/png", issued.root)
    assert read.assertion("movieq.generation") == {"task_id": "task-1", "task_type": "generate_image"}
    assert read.source.endswith("/trainedAlgorithmicMedia")
    assert not [word for word in (b"Marrakesh", b"some-model", REVISION.encode()) if word in body]


async def test_what_cannot_be_signed_is_published_with_a_warning_unless_signing_is_required(tmp_path: Path, signer: Credentials) -> None:
    path = tmp_path / "output.txt"
    path.write_text("a line")
    run = Done("run", (Produced(str(path), "output", "text/plain"),), {"warnings": ["before"]})
    result = await signed(Provenance(credentials=signer), task(), PROMPT, run)
    assert result.metadata["warnings"][0] == "before"
    assert "cannot be signed" in result.metadata["warnings"][1]
    assert "signed_by" not in result.metadata
    with pytest.raises(Unsigned, match="cannot be signed"):
        await signed(Provenance(credentials=signer, required=True), task(), PROMPT, run)


async def test_a_certificate_that_has_expired_meanwhile_signs_nothing_more(tmp_path: Path) -> None:
    expired = credentials.read(*chain(tmp_path / "expired", days=0.5)[:2])
    assert expired.expires < datetime.now(UTC)
    with pytest.raises(Unsigned):
        await signed(Provenance(credentials=expired, required=True), task(), PROMPT, done(tmp_path, "png"))


async def test_an_engine_that_does_not_say_what_it_makes_is_taken_for_a_trained_one(
    tmp_path: Path, issued: Chain, signer: Credentials
) -> None:
    run = msgspec.structs.replace(done(tmp_path, "png"), metadata={})
    result = await signed(Provenance(credentials=signer), task(), PROMPT, run)
    assert Read(Path(result.files[0].path).read_bytes(), "image/png", issued.root).source.endswith("/trainedAlgorithmicMedia")
