"""A GPU that is not there: tensors that are on 'gpu:0' and hold their values on the CPU, so that `.item()` and all
arithmetic work. As on a GPU, an operation that mixes devices fails, as does a CPU's generator for a tensor on the
device. `syncs` counts where the host waits for the device, `uploads` copies to the device that the host waits for, and
`unordered` gradients whose sums depend on the order of threads, which torch's deterministic mode refuses on a GPU.

The device is one of torch's Python backends for others (PrivateUse1), because a 'cuda' tensor's gradient asks a driver
for a stream. Importing it changes torch for the process, so what uses it runs in a process of its own."""

import collections
import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.modules.rnn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
INDEXING |= {aten._unsafe_index.Tensor}
COPIES = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}
WAITING = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.is_nonzero.default}
WAITING |= {aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.allclose.default}
WAITING |= {aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.bincount.default}
NO_SCALARS = ("cat.", "stack", "foreach", "mm", "convolution", "lerp")  # what takes no CPU scalar beside the device
# of what torch.use_deterministic_algorithms lists, the operations that music meets
UNORDERED = {f"aten.{pad}{n}d_backward" for pad in ("reflection_pad", "replication_pad") for n in (1, 2, 3)}
UNORDERED |= {f"aten.upsample_{mode}_backward" for mode in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")}
UNORDERED |= {f"aten._adaptive_avg_pool{n}d_backward" for n in (2, 3)} | {"aten.grid_sampler_2d_backward"}
UNORDERED |= {"aten.cumsum", "aten.histc", "aten.kthvalue", "aten.median", "aten.put_", "aten.bincount"}
STAGED = 1 << 16  # bytes that a driver's own buffer takes at once, from memory that is not pinned
syncs, uploads, unordered = (collections.Counter() for _ in range(3))  # operation and line of lib → how often


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed(self, seed: int) -> None:
        """Random numbers come from the CPU's generator."""

    def set_device(self, device: Any) -> None:
        """There is one."""

    def synchronize(self, *device: Any) -> None:
        """Nothing runs behind the host."""


_setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
GPU = torch.device("gpu:0")


class Placed(Tensor):
    """A tensor on the device, with its values in `values`, a tensor on the CPU."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "Placed":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "layout": values.layout}
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=GPU, **layout)

    def __init__(self, values: Tensor):
        self.values = values

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Placed({list(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.values.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> "Placed":
        copied = Placed(self.values.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):  # torch's own mark of parameters that are no `nn.Parameter`
            copied._is_param = True
        return copied

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(operation, args, kwargs or {})


def run(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation as the device would take it, with the CPU's arithmetic."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    placed, others = ([x for x in tensors if isinstance(x, Placed) is on] for on in (True, False))
    device = kwargs.get("device")
    target = torch.device(device).type if device is not None else None
    on_device = target == "gpu" or (target is None and bool(placed))
    name = str(operation)
    _refuse_mixed(operation, name, args, placed, others)
    generators = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)]
    if on_device and any(generator.device.type == "cpu" for generator in generators):
        raise RuntimeError(f"Expected a 'gpu' device type for generator but found 'cpu': {name}")
    if on_device and name.rpartition(".")[0] in UNORDERED:  # an exception in a gradient's thread would end the process
        unordered[f"{name} {line()}"] += 1
    _count_waits(operation, name, args, kwargs, placed, others, target)

    values = [x.values if isinstance(x, Placed) else x for x in tensors]
    known = {id(value): x for value, x in zip(values, tensors, strict=True)}
    args, kwargs = tree_map(lambda x: x.values if isinstance(x, Placed) else x, (args, dict(kwargs)))
    if target == "gpu":
        kwargs["device"] = torch.device("cpu")
    kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
    try:
        result = operation(*args, **kwargs)
    except RuntimeError as error:  # a wrapper's strides are those of its first values
        if operation is not aten.view.default or "view size is not compatible" not in str(error):
            raise
        result = aten.reshape.default(*args, **kwargs)

    def placed_as(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known.get(id(x)) if id(x) in known else Placed(x) if on_device else x

    return tree_map(placed_as, result)


def _refuse_mixed(operation: Any, name: str, args: tuple, placed: list[Tensor], others: list[Tensor]) -> None:
    if not placed or not others or operation in COPIES:
        return
    bad = [x for x in others if x.ndim or any(part in name for part in NO_SCALARS)]
    if operation in INDEXING and isinstance(args[0], Placed):  # indices may be on the CPU
        values = [x for x in args[2:] if isinstance(x, Tensor)]
        bad = [x for x in values if not isinstance(x, Placed) and x.ndim]
    elif not any(x.ndim for x in placed):  # a scalar on the device with a tensor that is not
        bad = others
    if bad:
        found = [("gpu" if isinstance(x, Placed) else "cpu", tuple(x.shape)) for x in (*placed, *others)]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {found}")


def _count_waits(
    operation: Any, name: str, args: tuple, kwargs: dict, placed: list[Tensor], others: list[Tensor], target: str | None
) -> None:
    if _reads_ahead():
        return
    checked = "linalg_" in name and "vector_norm" not in name  # a solver says whether it succeeded
    if placed and (operation in WAITING or checked or _indexes_by_mask(operation, args)):
        syncs[f"{name} {line()}"] += 1
    if operation in INDEXING and isinstance(args[0], Placed):
        from_host = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and not isinstance(x, Placed)]
        uploads.update({f"{name} {line()}": len(from_host)} if from_host else {})
    if operation is aten._to_copy.default:
        if placed and target == "cpu":
            syncs[f"to the CPU {line()}"] += 1
        if others and target == "gpu" and _waits_to_send(others[0], kwargs.get("non_blocking")):
            uploads[f"{tuple(others[0].shape)} {line()}"] += 1
    if operation is aten.copy_.default:
        _count_copy(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))


def _reads_ahead() -> bool:
    """In a thread that may wait."""
    return threading.current_thread().name.startswith("prefetch")


def _count_copy(source: Tensor, to: Tensor, non_blocking: bool) -> None:
    if isinstance(source, Placed) and not isinstance(to, Placed):
        syncs[f"copied to the CPU {line()}"] += 1
    if isinstance(to, Placed) and not isinstance(source, Placed) and _waits_to_send(source, non_blocking):
        uploads[f"{tuple(source.shape)} {line()}"] += 1


def _waits_to_send(source: Tensor, non_blocking: bool | None) -> bool:
    return not (non_blocking and (getattr(source, "pinned", False) or source.nbytes <= STAGED))


def _pinned(x: Tensor) -> Tensor:
    copy = x.clone()
    copy.pinned = True
    return copy


def _indexes_by_mask(operation: Any, args: tuple) -> bool:
    """Whose places the host must count."""
    return operation in INDEXING and any(isinstance(x, Placed) and x.dtype == torch.bool for x in tree_leaves(args[1]))


def line() -> str:
    """The innermost line of lib that is running."""
    for frame in reversed(traceback.extract_stack()):
        if "/lib/" in frame.filename and "-packages" not in frame.filename:
            return f"lib/{frame.filename.rsplit('/lib/', 1)[1]}:{frame.lineno}"
    return "outside lib"


class Dispatch(TorchDispatchMode):
    """Operations that make a tensor on the device of none that is there."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "gpu":
            return run(operation, args, kwargs)
        return operation(*args, **kwargs)


class Function(TorchFunctionMode):
    """What 'cuda' means here, and the two functions that do not reach the dispatcher as they do on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tuple(map(_meant, args)), {name: _meant(x) for name, x in (kwargs or {}).items()}
        first = args[0] if args else None
        if function is Tensor.tolist and isinstance(first, Placed):
            syncs[f"tolist {line()}"] += 1
            return first.detach().values.tolist()
        if function is torch.stft and isinstance(first, Placed):  # torch's own ends in a transpose in place
            return stft(*args, **kwargs)
        return function(*args, **kwargs)


def _meant(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == "cuda":
        return GPU
    return "gpu:0" if isinstance(x, str) and x.startswith("cuda") else x


def stft(x: Tensor, n_fft: int, hop_length: int, *, window: Tensor, **options: Any) -> Tensor:
    if options.get("center", True):
        padded = nn.functional.pad(x[:, None], (n_fft // 2,) * 2, mode=options.get("pad_mode", "reflect"))
        x = padded[:, 0]
    return torch.fft.rfft(x.unfold(-1, n_fft, hop_length) * window).mT


class InferenceMode:
    """A wrapper cannot be an inference tensor: without gradients is near enough."""

    def __init__(self, mode: Any = True):
        self.mode = mode

    def __enter__(self) -> Any:
        self.context = torch.no_grad() if self.mode else contextlib.nullcontext()
        return self.context.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self.context.__exit__(*error)

    def __call__(self, function: Callable) -> Callable:
        return torch.no_grad()(function) if self.mode else function


class LstmByHand:
    """`torch._VF` whose LSTM works on the device: the CPU's fused one would not reach the wrapper step by step."""

    def __init__(self, functions: Any):
        self.functions = functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.functions, name)

    def lstm(self, x: Tensor, hx: Any, weights: Any, bias: bool, layers: int, *rest: Any) -> Any:
        if not isinstance(x, Placed):
            return self.functions.lstm(x, hx, weights, bias, layers, *rest)
        _, training, _, batch_first = rest
        if x.requires_grad and torch.is_grad_enabled() and not training:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        x = x.transpose(0, 1) if batch_first else x
        for layer in range(layers):
            of_input, of_state, input_bias, state_bias = weights[4 * layer : 4 * layer + 4]
            h, c, outputs = hx[0][layer], hx[1][layer], []
            for frame in x:
                gates = frame @ of_input.T + input_bias + h @ of_state.T + state_bias
                i, f, g, o = gates.chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
            x = torch.stack(outputs)
        return (x.transpose(0, 1) if batch_first else x), h[None], c[None]


def _factory(operation: Any) -> Callable:
    return lambda *args, **kwargs: run(operation, args, kwargs | {"device": GPU})


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    if not _reads_ahead():
        _count_copy(source, to, non_blocking)
    (to.values if isinstance(to, Placed) else to).copy_(source.values if isinstance(source, Placed) else source)
    return to


torch.inference_mode, Tensor.pin_memory = InferenceMode, _pinned
torch.nn.modules.rnn._VF = LstmByHand(torch.nn.modules.rnn._VF)
torch.__future__.set_swap_module_params_on_conversion(True)
_autocast = torch.library.Library("_", "IMPL")
_autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast does nothing here
_kernels = torch.library.Library("aten", "IMPL")
for _made in ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "linspace"):
    _packet, _, _overload = _made.partition(".")
    _kernels.impl(_made, _factory(getattr(getattr(aten, _packet), _overload or "default")), "PrivateUse1")
_kernels.impl("randperm", _factory(aten.randperm.default), "PrivateUse1")
_kernels.impl("_copy_from", _copy_from, "PrivateUse1")


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """In which 'cuda' names the device."""
    with Function(), Dispatch():
        yield
