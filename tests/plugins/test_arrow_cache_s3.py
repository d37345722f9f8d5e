"""The cache of Arrow files on S3: a server on this machine that speaks as S3 does."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="pip install s3fs")
pytest.importorskip("moto.server", reason="pip install 'moto[server]'")

import s3fs
from moto.server import ThreadedMotoServer

from kdframe.api import InputError
from kdframe.testing import cache_rows as kit
from kdframe.testing.caches import CacheContract
from kdframe_arrow_cache import ArrowCache


@pytest.fixture(scope="module")
def options():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = {"endpoint_url": f"http://{host}:{port}", "key": "k", "secret": "s"}
    s3fs.S3FileSystem(**found).mkdir("bucket")
    yield found
    server.stop()


class TestArrowCacheOnS3(CacheContract):
    damaged_files = False

    @pytest.fixture(autouse=True)
    def _server(self, options):
        self.options = options

    def config(self, folder):
        return ArrowCache(url=f"s3://bucket{folder}", storage_options=self.options)

    def shards(self, folder):
        found = s3fs.S3FileSystem(**self.options).find(f"bucket{folder}/shards")
        return [Path(path).name for path in found]


def test_a_bucket_that_is_not_there_is_told(tmp_path, options):
    config = ArrowCache(url="s3://nobody/cache", storage_options=options)
    with pytest.raises(InputError, match="s3://nobody/cache"):
        config.open(kit.spec(tmp_path / "local"))


def test_a_server_that_does_not_answer_is_told(tmp_path, options):
    dead = {**options, "endpoint_url": "http://127.0.0.1:9"}
    with pytest.raises(InputError, match=r"s3://bucket/x cannot be used .*start again"):
        ArrowCache(url="s3://bucket/x", storage_options=dead).open(kit.spec(tmp_path / "local"))
