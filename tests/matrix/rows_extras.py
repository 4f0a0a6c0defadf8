"""Rows that need other packages (`requirements.txt`) or much time: `make matrix` runs them. Each imports its package
when it runs."""

import tempfile
from pathlib import Path

import torch
from matrix.networks import COLUMNS, IN_MODULES, LINEAR, Network, batch, eager
from matrix.rows import PATHS, row
from torch import Tensor, nn

ONNX, LIBRARIES, SWAPS = "ONNX (inference)", "Libraries", "Libraries that replace linear layers"
STEPS, RATE = 3, 0.1


def extra(group: str, name: str, **options):
    return row(group, name, heavy=PATHS, columns=IN_MODULES, **options)


# --- ONNX
# ------------------------------------------------------------------------------------------------------------------


def by_onnx(network: Network, **options) -> list[Tensor]:
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(network, batch(), file, input_names=["x", "labels"], **options)
        model = onnx.load(file)
        foreign = {(node.domain, node.op_type) for node in model.graph.node if node.domain not in ("", "ai.onnx")}
        assert not foreign, foreign
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        x, labels = batch()
        (loss,) = session.run(None, {"x": x.numpy(), "labels": labels.numpy()})
    return [torch.from_numpy(loss)]


@extra(ONNX, "`torch.onnx.export(dynamo=True)`, run by onnxruntime", expected=lambda plain: eager(plain)[:1])
def _(network: Network) -> list[Tensor]:
    return by_onnx(network, dynamo=True, verbose=False)


@extra(ONNX, "`torch.onnx.export(dynamo=False)`, run by onnxruntime", expected=lambda plain: eager(plain)[:1])
def _(network: Network) -> list[Tensor]:
    return by_onnx(network, dynamo=False)


# --- training loops
# ----------------------------------------------------------------------------------------------------------


def trained(plain: Network) -> list[Tensor]:
    """What all loops must give: three steps of SGD over the same batch."""
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    for _ in range(STEPS):
        eager(plain)
        optimizer.step()
    return [p.detach() for p in plain.parameters()]


def loader() -> torch.utils.data.DataLoader:
    x, labels = batch()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=len(x))


@extra(LIBRARIES, "Lightning", expected=trained)
def _(network: Network) -> list[Tensor]:
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, rows, _) -> Tensor:
            return self.network(*rows)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(max_epochs=STEPS, accelerator="cpu", devices=1, **quiet).fit(Module(), loader())
    return [p.detach() for p in network.parameters()]


@extra(LIBRARIES, "accelerate", expected=trained)
def _(network: Network) -> list[Tensor]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, rows = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=RATE), loader())
    for _ in range(STEPS):
        for x, labels in rows:
            optimizer.zero_grad()
            accelerator.backward(model(x, labels))
            optimizer.step()
    return [p.detach() for p in network.parameters()]


@extra(LIBRARIES, "the Trainer of transformers", expected=trained)
def _(network: Network) -> list[Tensor]:
    import transformers

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.network(x, labels)}

    x, labels = batch()
    data = [{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)]
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=len(x),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            max_grad_norm=0.0,
        )
        transformers.Trainer(Model(), arguments, train_dataset=data, optimizers=(optimizer, schedule)).train()
    return [p.detach() for p in network.parameters()]


@extra(LIBRARIES, "skorch", expected=trained)
def _(network: Network) -> list[Tensor]:
    import skorch

    class Net(skorch.NeuralNet):
        def get_loss(self, y_pred: Tensor, y_true: Tensor, *args, **kwargs) -> Tensor:
            return self.module_.loss_of(y_pred, y_true)

    class Module(nn.Module):
        """The encoder's output is the prediction."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.loss_of = network.loss_of

        def forward(self, x: Tensor) -> Tensor:
            return self.network.encoder(x).tanh()

    x, labels = batch()
    options = {
        "max_epochs": STEPS,
        "batch_size": -1,
        "train_split": None,
        "verbose": 0,
        "optimizer": torch.optim.SGD,
        "lr": RATE,
    }
    Net(Module(), criterion=nn.Module, **options).fit(x.numpy(), labels)
    return [p.detach() for p in network.parameters()]


@extra(LIBRARIES, "safetensors: λ is in the file")
def _(network: Network) -> list[Tensor]:
    from safetensors.torch import load_model, save_model

    other = COLUMNS[network.column]()
    for module in other.modules():
        for name in ("lambda_", "coeff"):
            if hasattr(module, name):
                setattr(module, name, 9.0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(network, str(Path(folder) / "model.safetensors"))
        load_model(other, str(Path(folder) / "model.safetensors"))
    return eager(other)


# --- swaps
# -----------------------------------------------------------------------------------------------------------------


def swapped(swap):
    """The libraries leave `GRLLinear` as it is, so that the plain network keeps that layer too."""

    def run(network: Network) -> list[Tensor]:
        swap(
            network,
            lambda module, name: isinstance(module, nn.Linear) and not (network.column == LINEAR and name == "domain"),
        )
        return eager(network)

    return run


def quantised(network: Network, which) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    quantize_(network, QATConfig(weight_config=weights, step="prepare"), filter_fn=which)


def float8(network: Network, which) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(network, module_filter_fn=which, config=Float8LinearConfig(emulate=True))


def eager_quantised(network: Network, which) -> None:
    import torch.ao.quantization as quantization

    per_tensor = quantization.get_default_qat_qconfig("x86", version=0)
    network.train()
    for name, module in list(network.named_modules()):
        if which(module, name):
            module.qconfig = per_tensor
    quantization.prepare_qat(network, inplace=True)


def lora(network: Network, which, **options) -> None:
    from peft import LoraConfig, get_peft_model

    names = [name for name, module in network.named_modules() if which(module, name)]
    torch.manual_seed(0)
    get_peft_model(
        network, LoraConfig(r=2, target_modules=names, init_lora_weights=False, **options)
    )  # random factors, not zeros


def lora_below(network: Network, which) -> None:
    lora(network, lambda module, name: name == "encoder", modules_to_save=["digit", "domain"])


def lora_of_adversary(network: Network, which) -> None:
    lora(network, lambda module, name: which(module, name) and "domain" in name.split(".") or name == "encoder")


for name, swap in {
    "peft: LoRA on all linear layers": lora,
    "peft: LoRA on the adversary and the encoder": lora_of_adversary,
    "peft: LoRA on the encoder, the heads in `modules_to_save`": lora_below,
    "torch.ao: `prepare_qat`": eager_quantised,
    "torchao: quantisation-aware training": quantised,
    "torchao: float8 training": float8,
}.items():
    extra(SWAPS, name, expected=swapped(swap))(swapped(swap))
