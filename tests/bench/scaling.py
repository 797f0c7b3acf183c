"""How training scales over devices, on paper."""


def scaling_efficiency(
    step_seconds: float,
    gradient_bytes: float,
    bandwidth: float,
    devices: int,
    *,
    latency: float = 10e-6,
    overlap: float = 0.0,
) -> float:
    """Throughput of `devices` that train together over `devices` times that of one, 0 to 1.

    A ring all-reduce sends 2 · (n − 1)/n of the gradient through every link and takes 2 · (n − 1) turns of `latency`
    seconds (Patarasuk and Yuan 2009). `bandwidth` is bytes a second of one link, in one direction. `overlap` is the
    share of a step (its backward pass) behind which the transfer can hide.
    """
    if min(step_seconds, gradient_bytes, bandwidth) <= 0 or devices < 1 or latency < 0 or not 0 <= overlap <= 1:
        raise ValueError("scaling_efficiency needs positive times, bytes and bandwidth, and an overlap from 0 to 1")
    transfer = 2 * (devices - 1) / devices * gradient_bytes / bandwidth + 2 * (devices - 1) * latency
    return step_seconds / (step_seconds + max(0.0, transfer - overlap * step_seconds))
