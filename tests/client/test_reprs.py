"""What objects show of themselves at a prompt and in a notebook."""

from __future__ import annotations

import html.parser

import pytest
import torch

import shmbroker
from shmbroker.client.channel import Channel


class Table(html.parser.HTMLParser):
    """The rows of a table, and every tag closed that was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_report_is_one_line_at_a_prompt_and_a_table_in_a_notebook(channel: Channel) -> None:
    double, fail = channel.bind("double"), channel.bind("fail")
    for _ in range(3):
        double(torch.ones(4))
    with pytest.raises(shmbroker.RemoteOpError):
        fail(torch.ones(4))
    report = channel.report()
    assert repr(report).startswith("<Report: 4 calls of 2 ops, 1 failed, ")
    assert "\n" not in repr(report)
    rows = Table(report._repr_html_()).rows
    assert rows[0] == ["", "double", "fail", "all"]
    assert rows[1] == ["calls", "3", "1", "4"]
    assert all(len(row) == 4 for row in rows)
    assert f"lane {channel.lane}" in report._repr_html_()


def test_names_in_a_notebooks_table_are_text(channel: Channel) -> None:
    report = channel.report()
    odd = type(report.total)(**{**dict.fromkeys(report.total.__struct_fields__, 0), "op": "<script>"})
    assert "<script>" not in type(report)(report.lane, report.doorbell, report.control, 0, odd, (odd,))._repr_html_()


def test_a_client_tells_its_channels_and_whether_it_is_closed(broker: shmbroker.LocalBroker, worker: int) -> None:
    with shmbroker.connect(arena="1M", name="someone", channels=4) as client:
        client.channel("test")
        assert repr(client) == f"<Client 'someone' of instance {broker.instance!r}: arena 1048576 bytes, 1 of 4 channels open>"
    assert repr(client).endswith("arena 1048576 bytes, the client is closed>")


def test_a_worker_tells_what_it_offers() -> None:
    worker = shmbroker.Worker("maths", name="me", instance="there")
    assert repr(worker) == "<Worker 'me': service 'maths' of instance 'there' on cpu: no ops yet>"
    worker.op("double", out_spec=lambda x: x)(lambda x: x * 2)
    assert repr(worker).endswith("on cpu: double>")
