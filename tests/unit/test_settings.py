"""Settings from the environment and from `.env`: what is wrong is refused with its cure, and what nothing reads is named."""

from __future__ import annotations

import base64
import codecs
import math
import secrets
from pathlib import Path

import msgspec
import pytest

from movieq import settings
from movieq.errors import SettingsError
from movieq.models import table as models
from movieq.settings import Settings, load, variable

NUMBERS = [field.name for field in msgspec.structs.fields(Settings) if type(field.default) in (int, float)]


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    """Where a `.env` may lie; there is none."""
    return tmp_path / ".env"


def refused(env_file: Path, **environ: str) -> str:
    """Why these settings are refused."""
    with pytest.raises(SettingsError) as caught:
        load({variable(name): value for name, value in environ.items()}, env_file)
    return caught.value.message


def taken(env_file: Path, **environ: str) -> Settings:
    """The settings of these variables."""
    return load({variable(name): value for name, value in environ.items()}, env_file)


# ── .env ──


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_an_env_file_that_is_not_utf_8_is_refused_with_the_cure(env_file: Path, encoding: str) -> None:
    env_file.write_bytes("MOVIEQ_STORAGE=/srv/föhn\n".encode(encoding))
    message = refused(env_file)
    assert str(env_file) in message
    assert "UTF-8" in message
    assert "föhn" not in message


def test_an_env_file_may_begin_with_the_mark_that_editors_on_windows_write(env_file: Path) -> None:
    env_file.write_bytes(codecs.BOM_UTF8 + "MOVIEQ_STORAGE=/srv/föhn\r\nMOVIEQ_CPU_SLOTS=3\r\n".encode())
    found = taken(env_file)
    assert (found.storage, found.cpu_slots) == (Path("/srv/föhn"), 3)
    assert settings.unknown({}, env_file) == {}


@pytest.mark.parametrize("content", [b"\x7fELF\x02\x00\x00MOVIEQ_STORAGE=x", b"\x1f\x8b\x08\x00binary", bytes(range(256))])
def test_an_env_file_that_is_no_text_is_refused(env_file: Path, content: bytes) -> None:
    env_file.write_bytes(content)
    assert str(env_file) in refused(env_file)


def test_an_env_file_that_leads_nowhere_is_refused(env_file: Path) -> None:
    env_file.symlink_to(env_file.parent / "gone")
    assert str(env_file) in refused(env_file)


def test_a_folder_called_env_is_no_env_file(env_file: Path) -> None:  # a virtual environment, say
    env_file.mkdir()
    assert taken(env_file) == Settings()


# ── What nothing reads ──


def test_what_looks_like_a_setting_and_is_none_is_named_wherever_it_stands(env_file: Path) -> None:
    env_file.write_text(
        "MOVIEQ_STORRAGE=x\nMOVIQ_SPOOL=x\nmovieq_engine=animatic\nOTHER=1\nMOVIEQ_API_KEYS\nMOVIEQ_MODELS: models.toml\nMOVIEQ_QUEUES=\n"
    )
    found = settings.unknown({"MOVIEQ_DRAIN": "5", "MOVIEQ_QUITE_ELSE": "1", "PATH": "/bin", "MOVIEQ_STORAGE": "x"}, env_file)
    text = "\n".join(found.values())
    assert found.keys() == {
        "MOVIEQ_DRAIN",
        "MOVIEQ_QUITE_ELSE",
        "MOVIEQ_STORRAGE",
        "MOVIQ_SPOOL",
        "movieq_engine",
        "MOVIEQ_API_KEYS",
        "line 6",
    }
    for near in ("MOVIEQ_DRAIN_S", "MOVIEQ_STORAGE", "MOVIEQ_SPOOL", "MOVIEQ_ENGINE"):
        assert f"did you mean {near}?" in text
    assert text.count(str(env_file)) == 5
    assert "models.toml" not in text  # a line may hold a secret


# ── Numbers ──


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e300", "-1", "9" * 30, "9" * 5000, "many", "0x10", "1,5", "true"])
def test_a_number_outside_its_range_is_refused_with_the_range(env_file: Path, name: str, value: str) -> None:
    message = refused(env_file, **{name: value})
    assert message.startswith(f"{variable(name)}: ")
    assert " to " in message
    assert len(message) < 300


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_at_either_end_of_its_range_is_taken(env_file: Path, name: str) -> None:
    field = next(each for each in msgspec.structs.fields(Settings) if each.name == name)
    info = msgspec.inspect.type_info(field.type)
    while isinstance(info, msgspec.inspect.Metadata):
        info = info.type
    assert isinstance(info, msgspec.inspect.IntType | msgspec.inspect.FloatType)
    assert info.ge is not None
    assert info.le is not None
    for value in (info.ge, info.le):
        found = getattr(taken(env_file, **{name: str(value)}), name)
        assert found == value
        assert math.isfinite(found)
        assert found * (86_400_000 if name.endswith("_days") else 1000) < 2**53  # a double of Lua holds it, as ms too


def test_every_wrong_setting_is_named_in_one_refusal(env_file: Path) -> None:
    message = refused(env_file, cpu_slots="0", keep_media_days="inf", cors_origins="app.example", file_tags="maybe", engine="steam")
    for name in ("cpu_slots", "keep_media_days", "cors_origins", "file_tags", "engine"):
        assert variable(name) in message
    assert "true or false" in message
    assert "auto, diffusers, animatic" in message
    assert "`" not in message


# ── Secrets ──


@pytest.mark.parametrize("secrets", ["x", "fifteen-letters", "long-enough-for-anybody,kurz", "kurz , long-enough-for-anybody"])
def test_a_short_signing_secret_is_refused_and_never_shown(env_file: Path, secrets: str) -> None:
    message = refused(env_file, signing_secret=secrets)
    assert "MOVIEQ_SIGNING_SECRET" in message
    assert "16" in message
    assert not [part for part in secrets.split(",") if len(part) > 1 and part.strip() in message]


def test_signing_secrets_of_sixteen_characters_are_taken(env_file: Path) -> None:
    assert taken(env_file, signing_secret="0123456789abcdef, fedcba9876543210").signing_secret == (
        b"0123456789abcdef",
        b"fedcba9876543210",
    )


def webhook_secret(size: int = 32) -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(size)).decode()


@pytest.mark.parametrize("size", [16, 24, 64])
def test_webhook_secrets_are_read_in_their_order(env_file: Path, size: int) -> None:
    one, other = webhook_secret(size), webhook_secret(size)
    assert taken(env_file, webhook_secret=f" {one} , {other}\n").webhook_secret == (one, other)
    assert taken(env_file, webhook_secret=one).webhook_secret == (one,)
    assert taken(env_file, webhook_secret="  ").webhook_secret == ()


@pytest.mark.parametrize(
    "wrong",
    [
        "hunter2hunter2hunter2hunter2",
        "whsec_",
        "whsec_hunter2",
        "whsec_hünter",
        webhook_secret(15),
        webhook_secret()[6:],
        webhook_secret()[:-3] + "!!=",
        webhook_secret(33)[:-1],
    ],
    ids=["no prefix", "nothing", "too short for base64", "not ASCII", "too few bytes", "prefix cut off", "not base64", "cut off"],
)
def test_a_wrong_webhook_secret_is_named_by_its_place_and_not_shown(env_file: Path, wrong: str) -> None:
    with pytest.raises(SettingsError, match="MOVIEQ_WEBHOOK_SECRET: secret 2 of 2") as raised:
        load({"MOVIEQ_WEBHOOK_SECRET": f"{webhook_secret()},{wrong}"}, env_file)
    assert wrong.removeprefix("whsec_")[:5] not in raised.value.message.replace("whsec_$(", "") or wrong == "whsec_"


def test_a_comma_too_many_is_a_wrong_webhook_secret(env_file: Path) -> None:
    with pytest.raises(SettingsError, match="secret 2 of 2"):
        load({"MOVIEQ_WEBHOOK_SECRET": f"{webhook_secret()},"}, env_file)


# ── Origins ──


@pytest.mark.parametrize(
    ("origin", "cure"),
    [
        ("https://app.example/", "https://app.example"),
        ("https://app.example/studio", "https://app.example"),
        ("https://app.example?x=1", "https://app.example"),
        ("app.example", "https://app.example"),
        ("localhost:3000", "https://localhost:3000"),
        ("HTTPS://App.Example", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80", "http://app.example"),
        ("https://user@app.example", "https://app.example"),
        ("https://*.app.example", ""),
        ("https://app.example:port", ""),
        ("https://app.example:99999", ""),
        ("https://föhn.example", "https://xn--fhn-sna.example"),
        ("https://", ""),
        ("null", ""),
        ("https://a b.example", ""),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused_with_the_one_that_it_does(env_file: Path, origin: str, cure: str) -> None:
    message = refused(env_file, cors_origins=f"https://good.example, {origin}")
    assert "MOVIEQ_CORS_ORIGINS" in message
    assert repr(origin) in message
    assert f"write {cure}" in message


@pytest.mark.parametrize("origins", ["*", "https://app.example, http://localhost:3000", "http://[::1]:3000", "capacitor://localhost"])
def test_an_origin_as_browsers_send_it_is_taken(env_file: Path, origins: str) -> None:
    assert taken(env_file, cors_origins=origins).cors_origins == tuple(origins.split(", "))


# ── Addresses ──


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("redis://queue.example/prod", "number"),
        ("redis://queue.example:6379/0/1", "number"),
        ("redis://queue.example/-1", "number"),
        ("redis://queue.example/٣", "number"),
        ("redis://queue.example?db=x", "number"),
        ("redis://queue.example/1?db=2", "both"),
        ("redis://queue.example?db=1&db=2", "db"),
        ("redis://queue.example:port/0", "port"),
        ("redis://queue.example:99999/0", "port"),
        ("redis://queue.example:0/0", "port"),
        ("redis://queue.example:/0", "port"),
        ("queue.example:6379", "redis://"),
        ("queue.example", "redis://"),
        ("http://queue.example:6379", "redis://"),
        ("redis:queue.example:6379", "redis://"),
        ("redis://", "host"),
        ("redis://:6379/0", "host"),
        ("redis://queue.example/0?decode_responses=true", "decode_responses"),
        ("redis://queue.example/0?protocol=3", "protocol"),
        ("redis://queue.example/0?sslcert=x", "sslcert"),
        ("redis://queue.example/0?ssl_ca_certs=/ca.pem", "rediss://"),
        ("rediss://queue.example/0?ssl_cert_reqs=sometimes", "ssl_cert_reqs"),
        ("rediss://queue.example/0?ssl_ca_certs=/nowhere/ca.pem", "/nowhere/ca.pem"),
        ("redis://queue.example/0?db", "db"),
        ("redis://queue.example/0#1", "#"),
        ("redis://a.example,b.example:6379/0", "one"),
        ("unix://tmp/redis.sock", "unix:///"),
        ("unix://", "unix:///"),
        ("unix:///tmp/redis.sock?db=x", "number"),
        ("redis://[::1/0", "redis://"),
    ],
)
def test_a_malformed_redis_url_is_refused_with_what_is_wrong(env_file: Path, url: str, word: str) -> None:
    message = refused(env_file, redis_url=url)
    assert message.startswith("MOVIEQ_REDIS_URL: ")
    assert word in message


@pytest.mark.parametrize("password", ["geheim#1", "geheim/1", "geheim?1", "geheim[1", "geheim/@1"])
def test_a_password_that_is_not_escaped_is_refused_and_never_shown(env_file: Path, password: str) -> None:
    message = refused(env_file, redis_url=f"redis://movieq:{password}@queue.example:6379/0")
    assert "%" in message
    assert "geheim" not in message


@pytest.mark.parametrize(
    "url",
    [
        "redis://queue.example",
        "redis://queue.example:6380/",
        "redis://:geheim@queue.example:6379/15",
        "rediss://movieq:ge%23heim@queue.example/0?ssl_cert_reqs=none&ssl_check_hostname=false",
        "redis://[::1]:6379/0?client_name=movieq",
        "redis://queue.example?db=3",
        "unix:///tmp/redis.sock?db=1",
        "unix://movieq:geheim@/tmp/redis.sock",
    ],
)
def test_a_redis_url_is_taken(env_file: Path, url: str) -> None:
    assert taken(env_file, redis_url=url).redis_url == url


@pytest.mark.parametrize(
    "url", ["movieq.example", "127.0.0.1:8001", "ftp://movieq.example", "https://", "https://movieq.example?x=1", "https://a:99999"]
)
def test_a_malformed_public_url_is_refused(env_file: Path, url: str) -> None:
    assert "https://movieq.example" in refused(env_file, public_url=url)


@pytest.mark.parametrize("storage", ["S3://film", "s3:/film", "s3:film", "https://film.example", "gs://film", "file:///srv/media"])
def test_a_storage_that_is_neither_a_folder_nor_a_bucket_is_refused(env_file: Path, storage: str) -> None:
    message = refused(env_file, storage=storage)
    assert message.startswith("MOVIEQ_STORAGE: ")
    assert "s3://BUCKET" in message


@pytest.mark.parametrize("name", ["r2_endpoint", "r2_public_url"])
@pytest.mark.parametrize("url", ["https://s3.example:port", "https://[::1", "s3.example", "https://s3.example:99999"])
def test_an_address_of_a_bucket_that_is_none_is_refused(env_file: Path, name: str, url: str) -> None:
    fields = {"storage": "s3://film", "r2_endpoint": "https://s3.example", "r2_access_key_id": "id", "r2_secret_access_key": "key"}
    assert f"{variable(name)}: " in refused(env_file, **{**fields, name: url})


@pytest.mark.parametrize("name", ["signing_secret", "storage", "api_keys", "redis_url", "webhook_secret"])
def test_a_variable_that_is_not_utf_8_is_refused(env_file: Path, name: str) -> None:
    assert f"{variable(name)}: " in refused(env_file, **{name: "a-secret-of-\udce4\udcff-the-tests"})


def test_a_table_of_models_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_bytes("[lamp]\n".encode("utf-16"))
    with pytest.raises(SettingsError) as caught:
        models.load(str(tmp_path / "models.toml"))
    assert "models.toml" in caught.value.message
    assert "UTF-8" in caught.value.message


def test_another_default_of_the_storage_gives_way_to_any_value_that_is_set(env_file: Path) -> None:
    other = Path("elsewhere/media")
    assert load({}, env_file, storage=other).storage == other
    assert load({"MOVIEQ_STORAGE": " "}, env_file, storage=other).storage == other
    assert load({"MOVIEQ_STORAGE": ".movieq/media"}, env_file, storage=other).storage == Path(".movieq/media")
    env_file.write_text("MOVIEQ_STORAGE=./.movieq/media\n")
    assert load({}, env_file, storage=other).storage == Path(".movieq/media")
