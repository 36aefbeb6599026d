"""What the device and the host did while a cell ran: read by a process of its own, null with the reason where unknown.

`fields` names what a row says, `window` computes it from readings (both pure), `host` and `device` read, `sampler` is
the process, `client` the parent's side of it, `throttling` what a reading means for the row. The times of a cell and
its telemetry come from different calls: nothing is read while calls are timed.
"""
