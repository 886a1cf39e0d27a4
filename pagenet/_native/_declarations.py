"""What native/pagenet.h and native/pace.h declare, named as it is there. Made by native/declare.py:
do not edit."""

from __future__ import annotations

from typing import Protocol

from ._pointers import CData, Null, Struct


class pn_progress(Struct):
    done: int
    error: int


class pn_event(Struct):
    start: int
    end: int
    length: int
    flags: int
    thread: int
    fd: int
    kind: int


class pn_map(Struct):
    magic: CData
    pages: int
    scope: int
    done: int
    finished: int
    events: CData
    classes: pn_class_stats


class pn_planted(Struct):
    uffd: int
    map: int
    refused: int


class pn_track(Struct):
    uffd: int
    pagemap: int
    address: int
    size: int
    page_size: int
    first: int
    names_empty: int


class pn_run(Struct):
    first: int
    count: int


class pn_placed(Struct):
    placed: int
    existed: int
    absent: int
    error: int


class pn_class_stats(Struct):
    counters: CData
    latency: CData


class pn_line(Struct):
    last: int
    step: int
    steps: int
    used: int
    faults: int


class pn_area(Struct):
    number: int
    level: int
    faults: int


class pn_want(Struct):
    first: int
    end: int
    page_size: int


class pn_stack(Struct):
    wants: pn_want
    oldest: int
    newest: int


class pn_window(Struct):
    fixed: int
    clock: int
    level: int
    lines: pn_line
    areas: pn_area
    wanted: pn_stack


class pn_fault_log(Struct):
    head: int
    tail: int
    dropped: int
    sleeping: int
    pages: CData


class pn_piece(Struct):
    first: int
    count: int
    page_size: int
    address: int
    second: int
    file_offset: int
    wire_first: int
    shift: int


class pn_dest_config(Struct):
    map: pn_map | Null
    scope: int
    pieces: pn_piece | Null
    by_address: CData | Null
    piece_count: int
    max_page_size: int
    uffd: int
    how: int
    file: int
    sealed: int
    outside_is_zero: int
    removes: int
    done_fd: int
    window: pn_window | Null
    faults: pn_fault_log | Null
    faults_fd: int
    encodings: int
    fills: pn_cache | Null
    shares: int


class pn_cache_config(Struct):
    map: pn_map | Null
    pages: int
    page_size: int
    memory: int
    file: int
    most: int


class pn_cache(Struct):
    pass


class pn_dest(Struct):
    pass


class pn_ring(Struct):
    head: int
    tail: int
    wake_at: int
    first: CData
    count: CData


class pn_end(Struct):
    kind: int
    error: int
    text: CData


class pn_tls(Struct):
    pass


class pn_lane_config(Struct):
    dest: pn_dest | Null
    ring: pn_ring | Null
    sock: int
    cache: pn_cache | Null
    tls: pn_tls | Null
    stop_fd: int
    work_fd: int
    room_fd: int
    window_least: int
    window_min: int
    window_max: int
    chunk: int


class pn_crew(Struct):
    pass


class pn_note(Struct):
    name: CData
    map: pn_map


class pn_greeting(Struct):
    pass


class pn_arrival(Struct):
    name: CData
    sock: int
    greeting: pn_greeting | Null


class pn_greeted(Struct):
    offset: int
    waited: int


class pn_greeter(Struct):
    pass


class pn_choice(Struct):
    mode: int
    sampled: int
    is_probing: int
    raw_ns: float
    recent: CData
    periods: int
    send_ns: float
    packed_ns: float
    pack_ns: float
    left: float
    settle: int
    bytes: int
    wire: int
    busy: int
    work: int
    mark: int
    until: int
    pause: int
    probe: int


class pn_demand_choice(Struct):
    packs: int
    is_trial: int
    settled: int
    count: int
    samples: CData
    before: float
    pause: int
    left: int


class pn_snapshot(Struct):
    pages: int
    objects: int
    frames: int
    runs: int
    object_sizes: CData | Null
    frame_offsets: CData | Null
    frame_objects: CData | Null
    frame_lengths: CData | Null
    frame_pages: CData | Null
    run_starts: CData | Null
    run_frames: CData | Null
    run_at: CData | Null
    frame_runs: CData | Null
    next_runs: CData | Null


class pn_snapshot_flaw(Struct):
    what: int
    at: int


class pn_frames(Struct):
    pass


class pn_rdma_block(Struct):
    first: int
    pages: int
    page_size: int
    chunk: int


class pn_rdma_config(Struct):
    lane: pn_lane_config
    device: bytes | CData | Null
    blocks: pn_rdma_block | Null
    block_count: int
    chunk_count: int
    chunk_size: int
    port: int
    gid_index: int


class pn_rdma_peer(Struct):
    gid: CData
    number: int
    psn: int
    lid: int
    mtu: int
    reads: int


class pn_rdma(Struct):
    pass


class pn_tls_psk(Struct):
    name: bytes | CData | Null
    key: CData | Null
    length: int


class pn_tls_config(Struct):
    serves: int
    authorities: bytes | CData | Null
    revoked: bytes | CData | Null
    certificate: bytes | CData | Null
    key: bytes | CData | Null
    psks: pn_tls_psk | Null
    psk_count: int


class pn_tls_context(Struct):
    pass


class pn_source_block(Struct):
    first: int
    pages: int
    page_size: int
    address: int
    name: bytes | CData | Null
    fd: int
    pid: int
    pidfd: int
    here: CData | Null
    frames: pn_frames | Null


class pn_keys_config(Struct):
    device: bytes | CData | Null
    blocks: pn_source_block | Null
    block_count: int
    chunk_count: int
    chunk_size: int
    pin_limit: int
    in_any_case: int
    port: int
    gid_index: int


class pn_keys(Struct):
    pass


class pn_reader(Struct):
    pass


class pn_lack(Struct):
    first: int
    count: int
    class_: int


class pn_source(Struct):
    pass


class pn_links(Struct):
    demand: CData


class pn_pace_tunables(Struct):
    window_least: int
    window_min: int
    window_max: int
    rdma_window_least: int
    rdma_window_min: int
    rdma_window_max: int
    prefetch_least: int
    prefetch_most: int
    most_dense: int
    quiet_ns: int
    look_ns: int
    limited_ns: int
    widen_ns: int
    moment_ns: int
    waits: float
    waits_much: float
    sample_ns: int
    sample_windows: int
    pause_ns: int
    most_pause_ns: int
    queue_ns: int
    other_time: float
    better: float
    as_good: float
    idle_link: float
    queues: float
    long_ns: int
    grows: int
    slow_link: float
    grant_ns: int
    catch_up_ns: int
    make_up_ns: int
    peak: float
    spin_ns: int
    spin_processors: int


class pn_pace_shared(Struct):
    last_fault: int
    waited: int
    best: int
    rate: int
    paid_until: int
    next_grant: int
    demand_bytes: int
    background_bytes: int
    led: int
    window: int


class pn_flow(Struct):
    in_flight: int
    window: int


class pn_pace_mark(Struct):
    time: int
    waited: int
    bytes: int


class pn_search(Struct):
    window: int
    trial: int
    stage: int
    opening: bool
    queued: bool
    again: bool
    down: bool
    sampling: bool
    mark: pn_pace_mark
    settled: int
    before: float
    tried: float
    next: int
    pause: int
    base: int
    beside: bool


class pn_pace(Struct):
    shared: pn_pace_shared | Null
    window_least: int
    window_max: int
    window_min: int
    chunk: int
    demand: pn_flow
    background: pn_flow
    leads: bool
    search: pn_search
    dense: int
    looked: int
    waited: int
    waiting: float
    starved: bool
    arrived: int
    rate: float


class Library(Protocol):
    PN_EVENT_PAGEFAULT: int
    PN_EVENT_FORK: int
    PN_EVENT_REMAP: int
    PN_EVENT_REMOVE: int
    PN_EVENT_UNMAP: int
    PN_TRACK_WRITTEN: int
    PN_TRACK_GONE: int
    PN_COPY: int
    PN_ZERO: int
    PN_CONTINUE: int
    PN_MOVE: int
    PN_POISON: int
    PN_MISSING: int
    PN_REQUESTED: int
    PN_PLACING: int
    PN_RESIDENT: int
    PN_REMOVED: int
    PN_OUTSIDE: int
    PN_POISONED: int
    PN_COMING: int
    PN_REMOVING: int
    PN_READY: int
    PN_COPIED: int
    PN_DEMAND: int
    PN_PREFETCH: int
    PN_BACKGROUND: int
    PN_PAGES: int
    PN_RUNS: int
    PN_ZERO_PAGES: int
    PN_WIRE_BYTES: int
    PN_EXISTED: int
    PN_DROPPED: int
    PN_REQUESTS: int
    PN_FAULTS: int
    PN_DEFERRED: int
    PN_LZ4_RUNS: int
    PN_LZ4_BYTES: int
    PN_LZ4_WIRE_BYTES: int
    PN_SAMPLED: int
    PN_SAMPLED_USED: int
    PN_OUTSIDE_FAULTS: int
    PN_COUNTERS: int
    PN_EVENTS: int
    PN_END_STOPPED: int
    PN_END_CLOSED: int
    PN_END_BROKEN: int
    PN_END_PROTOCOL: int
    PN_END_FAILED: int
    PN_END_OWNER_GONE: int
    PN_END_OWNER_WRONG: int
    PN_END_PLACING: int
    PN_END_NO_MEMORY: int
    PN_NAME: int
    PN_GREETINGS: int
    PN_OFFER: int
    PN_GREETED: int
    PN_LZ4_GAIN: int
    PN_ZERO_FRAME: int
    PN_NO_RUN: int
    PN_FLAW_NONE: int
    PN_FLAW_FRAME: int
    PN_FLAW_RUN: int
    PN_FLAW_END: int
    PN_FLAW_UNUSED: int
    PN_TLS_NAME: int
    PN_TLS_NAMES: int
    PN_TLS_MEMORY: int
    PN_TLS_AUTHORITIES: int
    PN_TLS_REVOKED: int
    PN_TLS_CERTIFICATE: int
    PN_TLS_KEY: int
    PN_TLS_SENDS: int
    PN_TLS_RECEIVES: int
    PN_PIECE_BYTES: int
    pn_tunables: pn_pace_tunables

    def pn_uffd_open(self, device: bytes | CData | Null, user_mode_only: int, /) -> int: ...
    def pn_uffd_api(self, uffd: int, wanted: int, features: CData | Null, /) -> int: ...
    def pn_uffd_register(
        self, uffd: int, start: int, length: int, mode: int, ioctls: CData | Null, /
    ) -> int: ...
    def pn_uffd_unregister(self, uffd: int, start: int, length: int, /) -> int: ...
    def pn_uffd_wake(self, uffd: int, start: int, length: int, /) -> int: ...
    def pn_uffd_probe(self, uffd: int, address: int, /) -> int: ...
    def pn_same_file(self, ours: int, pid: int, theirs: int, /) -> int: ...
    def pn_take_descriptor(self, pidfd: int, theirs: int, /) -> int: ...
    def pn_uffd_copy(
        self, uffd: int, to: int, from_: bytes | CData | Null, length: int, /
    ) -> pn_progress: ...
    def pn_uffd_zeropage(self, uffd: int, start: int, length: int, /) -> pn_progress: ...
    def pn_uffd_continue(self, uffd: int, start: int, length: int, /) -> pn_progress: ...
    def pn_uffd_move(self, uffd: int, to: int, from_: int, length: int, /) -> pn_progress: ...
    def pn_uffd_poison(self, uffd: int, start: int, length: int, /) -> pn_progress: ...
    def pn_uffd_read(
        self, uffd: int, map: pn_map | Null, events: pn_event | Null, room: int, /
    ) -> int: ...
    def pn_plant(
        self, pid: int, pidfd: int, device: bytes | CData | Null, planted: pn_planted | Null, /
    ) -> int: ...
    def pn_uproot(self, pid: int, pidfd: int, planted: pn_planted | Null, /) -> int: ...
    def pn_borrow(self, pid: int, pidfd: int, refused: CData | Null, /) -> int: ...
    def pn_track_probe(self, pagemap: int, /) -> int: ...
    def pn_track_arm(self, track: pn_track | Null, /) -> int: ...
    def pn_track_disarm(self, track: pn_track | Null, /) -> int: ...
    def pn_track_check(self, track: pn_track | Null, /) -> int: ...
    def pn_track_scan(
        self, track: pn_track | Null, what: int, at: CData | Null, runs: pn_run | Null, room: int, /
    ) -> int: ...
    def pn_track_mark(self, bits: CData | Null, runs: pn_run | Null, count: int, /) -> None: ...
    def pn_place(
        self,
        uffd: int,
        how: int,
        to: int,
        from_: bytes | CData | Null,
        length: int,
        page_size: int,
        /,
    ) -> pn_placed: ...
    def pn_settle(
        self, uffd: int, to: int, minor: int, zeros: bytes | CData | Null, page_size: int, /
    ) -> pn_placed: ...
    def pn_answer_outside(self, uffd: int, address: int, flags: int, zero: int, /) -> int: ...
    def pn_map_bytes(self, pages: int, /) -> int: ...
    def pn_map_init(self, map: pn_map | Null, pages: int, /) -> None: ...
    def pn_map_publish(self, map: pn_map | Null, /) -> None: ...
    def pn_map_state(self, map: pn_map | Null, page: int, /) -> int: ...
    def pn_map_recover(self, map: pn_map | Null, pages: int, /) -> int: ...
    def pn_map_removals(self, map: pn_map | Null, events: pn_event | Null, /) -> int: ...
    def pn_map_claim(
        self, map: pn_map | Null, first: int, count: int, from_: int, to: int, /
    ) -> int: ...
    def pn_map_set(self, map: pn_map | Null, first: int, count: int, to: int, /) -> None: ...
    def pn_map_replace(
        self, map: pn_map | Null, first: int, count: int, from_: int, to: int, /
    ) -> int: ...
    def pn_map_find(self, map: pn_map | Null, first: int, end: int, state: int, /) -> int: ...
    def pn_map_unsettled(self, map: pn_map | Null, first: int, end: int, /) -> int: ...
    def pn_map_span(self, map: pn_map | Null, first: int, end: int, state: int, /) -> int: ...
    def pn_map_stale(
        self,
        map: pn_map | Null,
        first: int,
        skip: int,
        shift: int,
        bits: CData | Null,
        from_: int,
        count: int,
        /,
    ) -> int: ...
    def pn_map_done(self, map: pn_map | Null, /) -> int: ...
    def pn_stats_add(
        self, map: pn_map | Null, class_: int, counter: int, amount: int, /
    ) -> None: ...
    def pn_stats_latency(self, map: pn_map | Null, class_: int, nanoseconds: int, /) -> None: ...
    def pn_window_init(self, window: pn_window | Null, /) -> None: ...
    def pn_window_fix(
        self, window: pn_window | Null, fixed: int, forward: int, backward: int, /
    ) -> None: ...
    def pn_window_fixed(
        self, window: pn_window | Null, forward: CData | Null, backward: CData | Null, /
    ) -> int: ...
    def pn_window_fault(
        self,
        window: pn_window | Null,
        map: pn_map | Null,
        page: int,
        first: int,
        end: int,
        page_size: int,
        /,
    ) -> None: ...
    def pn_window_next(
        self, window: pn_window | Null, map: pn_map | Null, bytes: int, first: CData | Null, /
    ) -> int: ...
    def pn_fault_log_read(
        self, log: pn_fault_log | Null, pages: CData | Null, room: int, /
    ) -> int: ...
    def pn_fault_log_write(
        self, log: pn_fault_log | Null, page: int, reader_fd: int, /
    ) -> None: ...
    def pn_cache_new(self, config: pn_cache_config | Null, /) -> pn_cache: ...
    def pn_cache_free(self, cache: pn_cache | Null, /) -> None: ...
    def pn_cache_resident(self, cache: pn_cache | Null, /) -> int: ...
    def pn_dest_new(self, config: pn_dest_config | Null, /) -> pn_dest: ...
    def pn_dest_free(self, dest: pn_dest | Null, /) -> None: ...
    def pn_before_sampled(self, first: int, count: int, /) -> int: ...
    def pn_dest_release(self, dest: pn_dest | Null, /) -> None: ...
    def pn_dest_withhold(self, dest: pn_dest | Null, withhold: int, /) -> None: ...
    def pn_dest_limit(self, dest: pn_dest | Null, bytes_per_second: int, /) -> None: ...
    def pn_ring_push(self, ring: pn_ring | Null, first: int, count: int, /) -> int: ...
    def pn_ring_used(self, ring: pn_ring | Null, /) -> int: ...
    def pn_ring_wake_at(self, ring: pn_ring | Null, runs: int, /) -> None: ...
    def pn_lane_run(self, config: pn_lane_config | Null, end: pn_end | Null, /) -> None: ...
    def pn_crew_new(self, count: int, /) -> pn_crew: ...
    def pn_crew_free(self, crew: pn_crew | Null, /) -> None: ...
    def pn_crew_run(
        self,
        crew: pn_crew | Null,
        config: pn_lane_config | Null,
        end: pn_end | Null,
        ended_fd: int,
        /,
    ) -> int: ...
    def pn_greeter_new(self, notes: pn_note | Null, channel: int, last: int, /) -> pn_greeter: ...
    def pn_greeter_free(self, greeter: pn_greeter | Null, /) -> None: ...
    def pn_greeter_open(
        self, greeter: pn_greeter | Null, key: bytes | CData | Null, listener: int, /
    ) -> int: ...
    def pn_greeter_shut(self, greeter: pn_greeter | Null, key: bytes | CData | Null, /) -> None: ...
    def pn_greeter_serve(
        self,
        greeter: pn_greeter | Null,
        key: bytes | CData | Null,
        cache: pn_cache | Null,
        size: int,
        file: int,
        offer: bytes | CData | Null,
        /,
    ) -> None: ...
    def pn_greeter_allow(self, greeter: pn_greeter | Null, places: int, /) -> None: ...
    def pn_greeter_take(self, greeter: pn_greeter | Null, into: pn_arrival | Null, /) -> int: ...
    def pn_greeter_arrived_fd(self, greeter: pn_greeter | Null, /) -> int: ...
    def pn_greeting_stop_listening(self, greeting: pn_greeting | Null, /) -> None: ...
    def pn_greeting_end(
        self, greeting: pn_greeting | Null, placed: pn_greeted | Null, /
    ) -> int: ...
    def pn_greeting_notes(self, greeting: pn_greeting | Null, /) -> pn_map: ...
    def pn_greeting_free(self, greeting: pn_greeting | Null, /) -> None: ...
    def pn_checksum(self, bytes: bytes | CData | Null, size: int, /) -> int: ...
    def pn_pack_state(self) -> int: ...
    def pn_pack(
        self, state: CData | Null, pages: bytes | CData | Null, size: int, to: CData | Null, /
    ) -> int: ...
    def pn_unpack(
        self, from_: bytes | CData | Null, length: int, pages: CData | Null, size: int, /
    ) -> int: ...
    def pn_choice_init(self, choice: pn_choice | Null, /) -> None: ...
    def pn_choice_packs(self, choice: pn_choice | Null, /) -> int: ...
    def pn_choice_for_demand(self, choice: pn_choice | Null, /) -> int: ...
    def pn_choice_wants_sample(self, choice: pn_choice | Null, now: int, /) -> int: ...
    def pn_choice_tried(
        self, choice: pn_choice | Null, size: int, length: int, ns: int, /
    ) -> None: ...
    def pn_choice_resume(self, choice: pn_choice | Null, now: int, /) -> None: ...
    def pn_choice_answered(
        self, choice: pn_choice | Null, bytes: int, wire: int, began: int, now: int, /
    ) -> None: ...
    def pn_demand_choice_init(self, choice: pn_demand_choice | Null, /) -> None: ...
    def pn_demand_choice_packs(self, choice: pn_demand_choice | Null, /) -> int: ...
    def pn_demand_choice_came(
        self, choice: pn_demand_choice | Null, packs: int, ns: int, /
    ) -> None: ...
    def pn_snapshot_check(self, snapshot: pn_snapshot | Null, /) -> pn_snapshot_flaw: ...
    def pn_frames_new(
        self,
        snapshot: pn_snapshot | Null,
        names: CData | Null,
        objects: int,
        file: int,
        name: bytes | CData | Null,
        place: bytes | CData | Null,
        /,
    ) -> pn_frames: ...
    def pn_frames_free(self, frames: pn_frames | Null, /) -> None: ...
    def pn_frames_need(
        self, frames: pn_frames | Null, offset: int, size: int, text: CData | Null, room: int, /
    ) -> int: ...
    def pn_frames_place(
        self,
        frames: pn_frames | Null,
        frame: int,
        fd: int,
        at: int,
        text: CData | Null,
        room: int,
        /,
    ) -> int: ...
    def pn_frames_put(
        self,
        frames: pn_frames | Null,
        frame: int,
        pages: CData | Null,
        text: CData | Null,
        room: int,
        /,
    ) -> int: ...
    def pn_frames_are_brought(self, frames: pn_frames | Null, /) -> int: ...
    def pn_frames_are_there(self, frames: pn_frames | Null, offset: int, size: int, /) -> int: ...
    def pn_frames_are_zero(self, frames: pn_frames | Null, offset: int, size: int, /) -> int: ...
    def pn_frames_lacking(
        self,
        frames: pn_frames | Null,
        offset: int,
        size: int,
        numbers: CData | Null,
        room: int,
        end: CData | Null,
        /,
    ) -> int: ...
    def pn_rdma_new(self, config: pn_rdma_config | Null, error: CData | Null, /) -> pn_rdma: ...
    def pn_rdma_free(self, rdma: pn_rdma | Null, /) -> None: ...
    def pn_rdma_number(self, rdma: pn_rdma | Null, queue_pair: int, /) -> int: ...
    def pn_rdma_connect(
        self, rdma: pn_rdma | Null, queue_pair: int, psn: int, peer: pn_rdma_peer | Null, /
    ) -> int: ...
    def pn_rdma_run(
        self, rdma: pn_rdma | Null, sock: int, tls: pn_tls | Null, end: pn_end | Null, /
    ) -> None: ...
    def pn_rdma_give_back(self, rdma: pn_rdma | Null, give_back: int, /) -> None: ...
    def pn_rdma_is_keyless(self, rdma: pn_rdma | Null, /) -> int: ...
    def pn_rdma_spun(self, rdma: pn_rdma | Null, /) -> int: ...
    def pn_tls_context_new(
        self, config: pn_tls_config | Null, which: CData | Null, text: CData | Null, size: int, /
    ) -> pn_tls_context: ...
    def pn_tls_context_free(self, context: pn_tls_context | Null, /) -> None: ...
    def pn_tls_new(
        self, context: pn_tls_context | Null, sock: int, host: bytes | CData | Null, /
    ) -> pn_tls: ...
    def pn_tls_free(self, tls: pn_tls | Null, farewell: int, /) -> None: ...
    def pn_tls_handshake(self, tls: pn_tls | Null, /) -> int: ...
    def pn_tls_wants_to_send(self, tls: pn_tls | Null, /) -> int: ...
    def pn_tls_text(self, tls: pn_tls | Null, /) -> bytes | CData: ...
    def pn_tls_send_bytes(
        self, tls: pn_tls | Null, bytes: bytes | CData | Null, size: int, /
    ) -> int: ...
    def pn_tls_receive_bytes(
        self, tls: pn_tls | Null, bytes: CData | Null, size: int, /
    ) -> int: ...
    def pn_tls_names(self, tls: pn_tls | Null, text: CData | Null, size: int, /) -> int: ...
    def pn_tls_cipher(self, tls: pn_tls | Null, /) -> bytes | CData: ...
    def pn_tls_kernel(self, tls: pn_tls | Null, /) -> int: ...
    def pn_keys_new(self, config: pn_keys_config | Null, error: CData | Null, /) -> pn_keys: ...
    def pn_keys_free(self, keys: pn_keys | Null, /) -> None: ...
    def pn_keys_pinned(self, keys: pn_keys | Null, /) -> int: ...
    def pn_keys_granted(self, keys: pn_keys | Null, /) -> int: ...
    def pn_reader_new(self, keys: pn_keys | Null, error: CData | Null, /) -> pn_reader: ...
    def pn_reader_free(self, reader: pn_reader | Null, /) -> None: ...
    def pn_reader_number(self, reader: pn_reader | Null, /) -> int: ...
    def pn_reader_connect(
        self, reader: pn_reader | Null, psn: int, peer: pn_rdma_peer | Null, /
    ) -> int: ...
    def pn_reader_run(
        self,
        reader: pn_reader | Null,
        sock: int,
        tls: pn_tls | Null,
        stop_fd: int,
        unread: bytes | CData | Null,
        length: int,
        end: pn_end | Null,
        /,
    ) -> None: ...
    def pn_source_new(
        self, blocks: pn_source_block | Null, count: int, links: pn_links | Null, ended_fd: int, /
    ) -> pn_source: ...
    def pn_source_free(self, source: pn_source | Null, /) -> None: ...
    def pn_source_add(
        self,
        source: pn_source | Null,
        sock: int,
        tls: pn_tls | Null,
        id: int,
        link: int,
        unread: bytes | CData | Null,
        length: int,
        /,
    ) -> int: ...
    def pn_source_remove(self, source: pn_source | Null, id: int, /) -> int: ...
    def pn_source_run(
        self, source: pn_source | Null, background: int, end: pn_end | Null, /
    ) -> None: ...
    def pn_source_stop(self, source: pn_source | Null, /) -> None: ...
    def pn_source_ended(
        self, source: pn_source | Null, id: CData | Null, end: pn_end | Null, /
    ) -> int: ...
    def pn_source_lacks(self, source: pn_source | Null, lack: pn_lack | Null, /) -> int: ...
    def pn_source_lacks_fd(self, source: pn_source | Null, /) -> int: ...
    def pn_source_look(self, source: pn_source | Null, /) -> None: ...
    def pn_pieces_came(self, here: CData | Null, first: int, count: int, /) -> None: ...
    def pn_source_asked(self, source: pn_source | Null, class_: int, /) -> int: ...
    def pn_source_zeros(self, source: pn_source | Null, /) -> int: ...
    def pn_source_kept(self, source: pn_source | Null, /) -> int: ...
    def pn_zero_run(
        self, buffer: bytes | CData | Null, pages: int, page_size: int, zero: CData | Null, /
    ) -> int: ...
    def pn_zero_map(
        self, fd: int, offset: int, pages: int, page_size: int, bits: CData | Null, /
    ) -> int: ...
    def pn_read_process(
        self, pid: int, address: int, buffer: CData | Null, length: int, /
    ) -> int: ...
    def pn_store(self, to: int, from_: bytes | CData | Null, length: int, /) -> int: ...
    def pn_copy(self, to: CData | Null, from_: bytes | CData | Null, length: int, /) -> None: ...
    def pn_map_memory(self, length: int, fd: int, offset: int, alignment: int, /) -> int: ...
    def pn_unmap_memory(self, address: int, length: int, /) -> None: ...
    def pn_map_file(self, length: int, fd: int, writable: int, /) -> int: ...
    def pn_populate(self, address: int, length: int, /) -> int: ...
    def pn_map_ahead(self, address: int, length: int, /) -> None: ...
    def pn_is_hole(self, fd: int, offset: int, size: int, /) -> int: ...
    def pn_punch(self, fd: int, length: int, /) -> int: ...
    def pn_pace_faulted(self, shared: pn_pace_shared | Null, now: int, /) -> None: ...
    def pn_pace_in_place(self, shared: pn_pace_shared | Null, waited: int, /) -> None: ...
    def pn_pace_limit(
        self, shared: pn_pace_shared | Null, bytes_per_second: int, now: int, /
    ) -> None: ...
    def pn_pace_grant(
        self,
        shared: pn_pace_shared | Null,
        now: int,
        wanted: int,
        page_size: int,
        wait: CData | Null,
        /,
    ) -> int: ...
    def pn_pace_refund(self, shared: pn_pace_shared | Null, bytes: int, /) -> None: ...
    def pn_pace_init(self, pace: pn_pace | Null, shared: pn_pace_shared | Null, /) -> None: ...
    def pn_pace_end(self, pace: pn_pace | Null, /) -> None: ...
    def pn_pace_sent(self, pace: pn_pace | Null, class_: int, bytes: int, /) -> None: ...
    def pn_pace_came(self, pace: pn_pace | Null, class_: int, bytes: int, now: int, /) -> None: ...
    def pn_pace_wire(self, pace: pn_pace | Null, class_: int, bytes: int, wire: int, /) -> int: ...
    def pn_pace_waited(self, pace: pn_pace | Null, latency: int, now: int, /) -> None: ...
    def pn_pace_response(self, pace: pn_pace | Null, latency: int, bytes: int, /) -> None: ...
    def pn_pace_look(self, pace: pn_pace | Null, now: int, prefetches: bool, /) -> None: ...
    def pn_pace_room(self, pace: pn_pace | Null, class_: int, /) -> int: ...
    def pn_pace_request_pages(self, pace: pn_pace | Null, page_size: int, /) -> int: ...
    def pn_pace_due(self, now: int, /) -> int: ...
    def pn_pace_spin(self, processors: int, /) -> int: ...
