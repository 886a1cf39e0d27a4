"""What native/testing/testing.h declares, named as it is there. Made by native/declare.py:
do not edit."""

from __future__ import annotations

from typing import Protocol

from ._pointers import CData, Null, Struct


class pn_map(Struct):
    pass


class pn_play(Struct):
    address: int
    page_size: int
    work_ns: int
    count: int
    threads: int
    pages: CData | Null
    works_ns: CData | Null
    latencies: CData | Null
    done: int
    blocked: int
    stall_ns: int
    until_complete: int


class pn_guest(Struct):
    socket: bytes | CData | Null
    shared: int
    size: int
    seed: int
    touches: int
    pages: CData | Null
    ended: CData | Null
    took: CData | Null
    connected: int
    wrong: int
    address: int
    uffd: int
    sock: int


class Library(Protocol):
    def pn_pattern_fill(
        self,
        buffer: CData | Null,
        first_page: int,
        pages: int,
        page_size: int,
        seed: int,
        zero_every: int,
        /,
    ) -> None: ...
    def pn_pattern_check(
        self,
        buffer: bytes | CData | Null,
        first_page: int,
        pages: int,
        page_size: int,
        seed: int,
        zero_every: int,
        bad: CData | Null,
        /,
    ) -> int: ...
    def pn_pattern_word(self, page: int, page_size: int, seed: int, zero_every: int, /) -> int: ...
    def pn_pattern_word_at(self, page: int, place: int, seed: int, zero_every: int, /) -> int: ...
    def pn_workload(self, argc: int, argv: CData | Null, /) -> int: ...
    def pn_bench_touch(
        self,
        address: int,
        page_size: int,
        pages: CData | Null,
        count: int,
        latencies: CData | Null,
        threads: int,
        limit_ns: int,
        map: pn_map | Null,
        /,
    ) -> int: ...
    def pn_bench_play(self, play: pn_play | Null, map: pn_map | Null, /) -> int: ...
    def pn_bench_count(
        self, map: pn_map | Null, pages: CData | Null, count: int, state: int, /
    ) -> int: ...
    def pn_bench_page_server(self, sock: int, page_size: int, /) -> int: ...
    def pn_bench_fault_floor(
        self, uffd: int, sock: int, stop_fd: int, page_size: int, /
    ) -> int: ...
    def pn_bench_send(
        self, sock: int, bytes: bytes | CData | Null, length: int, chunk: int, /
    ) -> int: ...
    def pn_bench_receive(
        self, sock: int, length: int, chunk: int, uffd: int, address: int, second: int, file: int, /
    ) -> int: ...
    def pn_bench_memcpy(self, to: int, from_: int, length: int, /) -> None: ...
    def pn_bench_write(self, address: int, page_size: int, pages: int, /) -> None: ...
    def pn_bench_scan(self, pagemap: int, address: int, length: int, /) -> int: ...
    def pn_bench_claims(self, map: pn_map | Null, /) -> int: ...
    def pn_bench_answer_pings(
        self, sock: int, directory: bytes | CData | Null, size: int, /
    ) -> int: ...
    def pn_bench_ping(
        self,
        sock: int,
        directory: bytes | CData | Null,
        size: int,
        count: int,
        latencies: CData | Null,
        /,
    ) -> int: ...
    def pn_bench_tls_send(
        self, sock: int, directory: bytes | CData | Null, length: int, chunk: int, /
    ) -> int: ...
    def pn_bench_tls_receive(
        self, sock: int, directory: bytes | CData | Null, length: int, chunk: int, /
    ) -> int: ...
    def pn_bench_relay(
        self,
        listener: int,
        host: bytes | CData | Null,
        port: int,
        delay_ns: int,
        rate: int,
        stop_fd: int,
        answered: CData | Null,
        /,
    ) -> int: ...
    def pn_bench_guest_prepare(self, guest: pn_guest | Null, /) -> int: ...
    def pn_bench_guest_arrive(self, guest: pn_guest | Null, /) -> int: ...
    def pn_bench_handler(
        self, listener: int, memory: bytes | CData | Null, size: int, stop_fd: int, /
    ) -> int: ...
