"""Keyturn: the boot agent of a confidential inference guest.

Read `boot.py` first: it is the worker's story, and the folders are its steps.

    closed.py        values that may leave the process: integers, enums, bounded identifiers
    errors.py        every way a boot can fail, who must act, and the exit status;  explanations.py  each of them at length
    events.py        everything a boot can say;  report.py  the four faces of one status
    config.py        the one parser of the measured configuration;  config_source.py  where its bytes come from
    modes.py         the ways to start the agent, and what each of them does not hold
    cli.py           finds the verb;  commands/  one lazily imported file per verb
    supervisor.py    standard library only: worker, server, signals;  beside it loop.py (waiting), publish.py (mounts),
                     telling.py and health.py (the faces), worker_process.py and channel.py (a worker and the wire to it)
    renewal.py       the lease of what is served, obeyed and renewed;  lease.py  the rules of that
    gpu_watch.py     the process that watches the GPUs while the server serves
    unhandled.py     what nobody caught becomes an event, never a traceback
    worker.py        the process around boot.py: its outcome, its one error
    boot.py          the worker's story, one step after the other
    doctor.py        what a boot would meet here, check by check, without a boot;  examination.py  findings, and their order
    fitness.py       kernel, driver and clock: is this guest one that a boot can use?
    stages.py        the declared stages and their durations;  retry.py  the one retry schedule;  threads.py  joined threads
    receipts.py      the notary of a boot: makes its receipt;  receipt.py  what stands in one;  cose.py  signatures
    keys.py          secrets in locked memory, the sealed key and its unwrapping;  jose.py  strict JSON, base64url and JWK
    tink_keyset.py   a model key as a Tink keyset;  store_credentials.py  what opens the model's store, kept by the key broker
    proxy.py         an HTTP proxy on the way, and what is said to it
    http_policy.py   the one TLS context and redirect rule for HTTP
    evidence/        what the guest says of itself: binding, formats, devices, the GPU gate
    verify/          signatures, chains and claims of evidence: the only place
    handshake/       the protocol machine, the token, the gRPC wire
    artifact/        the sealed model: format, sources, memory, opening, sealing; encrypted volumes; what `load` left
    server/          the model server: presets, spawn, readiness, restart policy
    guest/           what we ask of the kernel: mounts, disks, device mapper, memory, hardening, Landlock, routes, uevents;
                     the guest's initdata, and the API of its own components where it is a CoCo guest
    broker/          the reference key broker, and the relay before a Trustee KBS
    sim/             simulated silicon in the real formats, a test KBS; never in a guest image
    demo/            one boot on simulated silicon with a real model, for people

There is no public Python API. The interfaces are the command line, the protocol, the
configuration schema, `artifact/FORMAT.md` and the exit table, each with its version.
"""

__version__ = "0.1.0"
