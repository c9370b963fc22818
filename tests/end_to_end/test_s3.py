"""A bucket is as good as a disk: ingest, curate, verify, train, resume and remove on a real S3 server on loopback."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipelines.write import write_sample
from tests.curation_corpora import picture
from tests.curation_runs import ROOT
from tests.end_to_end.clew import PATIENCE


@pytest.fixture
def server() -> Iterator[str]:
    started = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    started.start()
    try:
        yield "http://{}:{}".format(*started.get_host_and_port())
    finally:
        started.stop()


def test_the_whole_job_in_a_bucket_equals_that_on_a_disk(server: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for shard in range(3):
        with open(tmp_path / "raw" / f"s-{shard}.tar", "wb") as file:
            for number in range(8):
                row = {"id": str(number), "format": "jpeg", "text": f"picture {number} of shard {shard}"}
                write_sample(file, row, picture(8 * shard + min(number, 6)), {})
            file.write(bytes(1024))
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    access = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    boto3.client(
        "s3", endpoint_url=server, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
    ).create_bucket(Bucket="pool")
    environment = {**os.environ, **access, "AWS_ENDPOINT_URL": server, "PYTHONPATH": str(ROOT), "CLEW_QUIET": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tests.s3_chain", str(tmp_path), "s3://pool"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-6000:]
