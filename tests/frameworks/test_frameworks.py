"""`docs/frameworks.md` with the real packages: a training that was saved in the middle and resumed ends with the very
weights of one that was not. `make frameworks` installs them and runs this; elsewhere what needs one is skipped."""

import importlib.util
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR

from grl_ext import LambdaScheduler, schedules

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
FRAMEWORKS = {
    "Without a framework": None,
    "Lightning": "lightning",
    "The Trainer of transformers": "transformers",
    "accelerate": "accelerate",
    "ignite": "ignite",
    "skorch": "skorch",
}

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The snippets save into the present folder. Nothing asks the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def require(package: str | None) -> None:
    if package and importlib.util.find_spec(package) is None:
        missing = f"{package} is not installed: make frameworks"
        pytest.fail(missing) if os.environ.get("GRL_EXT_REQUIRE_FRAMEWORKS") == "1" else pytest.skip(missing)


def run(heading: str) -> dict:
    """The names that the page's first block and the one under that heading leave."""
    blocks = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    sections = dict(zip(["", *blocks[1::2]], blocks[::2], strict=True))
    names = {"__name__": "snippet"}
    for section in ("", heading):
        (code,) = re.findall(r"^```python\n(.*?)^```$", sections[section], re.DOTALL | re.MULTILINE)
        exec(compile(code, f"{PAGE.name}: {section}", "exec"), names)
    return names


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys() and any(name.endswith("lambda_") for name in one)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("heading", FRAMEWORKS)
def test_a_resumed_training_ends_with_the_same_bits(heading):
    require(FRAMEWORKS[heading])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(lambda|LambdaScheduler)")
        names = run(heading)
    whole, resumed = names["whole"], names["resumed"]
    assert whole is not resumed
    assert differing(whole, resumed) == []
    assert whole.heads.lambda_["domain"].item() == schedules.dann()(1.0)
    # Lambda has an effect that these bits show.
    names["schedule"] = schedules.constant(0.5)
    assert len(differing(whole, names["train"]())) > 3


def test_where_the_position_is_not_read_from_the_optimizer_the_bits_differ(monkeypatch):
    monkeypatch.setattr("grl_ext.schedules._OptimizerSteps._read", lambda self: None)
    with pytest.warns(UserWarning, match="To resume, load the optimizer's state too"):
        names = run("Without a framework")
    assert "encoder.0.weight" in differing(names["whole"], names["resumed"])


# --- handed over as a scheduler: whatever the framework does with it, lambda moves with the optimizer's steps alone
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_lightning_takes_it_for_a_learning_rate_scheduler(interval):
    require("lightning")
    names = run("Lightning")

    class Module(names["Module"]):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            scheduler = LambdaScheduler(self.network, schedules.dann(), 16, optimizer=optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    names["Module"] = Module
    assert differing(names["whole"], names["train"]()) == []
    (checkpoint,) = Path("lightning").glob("epoch=1-v*.ckpt")  # beside the one of the page's own run
    assert torch.load(checkpoint, weights_only=False)["lr_schedulers"][0]["last_step"] == 8
    assert differing(names["whole"], names["train"](checkpoint)) == []


def test_lightnings_own_loop_may_be_left_and_its_wrapped_optimizer_given():
    require("lightning")
    names = run("Lightning")

    class Module(names["Module"]):
        automatic_optimization = False

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

        def on_train_start(self):
            self.scheduler = LambdaScheduler(self.network, schedules.dann(), 16, optimizer=self.optimizers())

        def training_step(self, batch, _):
            self.optimizers().zero_grad()
            self.manual_backward(self.network(*batch))
            self.optimizers().step()

    names["Module"] = Module
    assert differing(names["whole"], names["train"]()) == []
    (checkpoint,) = Path("lightning").glob("epoch=1-v*.ckpt")
    assert differing(names["whole"], names["train"](checkpoint)) == []  # made after the optimizer was loaded


def test_the_trainer_takes_it_chained_with_learning_rates():
    require("transformers")
    names = run("The Trainer of transformers")

    def train(resume=None):
        model = names["Model"]()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scheduler = LambdaScheduler(model, schedules.dann(), 16, optimizer=optimizer)
        both = ChainedScheduler([LinearLR(optimizer, total_iters=16), scheduler])
        settings = names["TrainingArguments"](
            "chained", num_train_epochs=4, per_device_train_batch_size=16, save_steps=8, report_to="none", use_cpu=True
        )
        rows = [{"x": x, "labels": label, "domains": domain} for x, label, domain in names["data"]]
        trainer = names["Trainer"](model, settings, train_dataset=rows, optimizers=(optimizer, both))
        trainer.train(resume_from_checkpoint=resume)
        assert scheduler.last_step == 16
        return model

    whole = train()
    saved = torch.load("chained/checkpoint-8/scheduler.pt")
    assert saved["_schedulers"][1] == {"last_step": 8, "total_steps": 16}
    assert differing(whole, train("chained/checkpoint-8")) == []


@pytest.mark.parametrize("made", ["before prepare", "after prepare"])
def test_accelerate_prepares_it_and_counts_steps_and_not_batches(made):
    require("accelerate")
    names = run("accelerate")
    accelerator = names["Accelerator"](cpu=True, gradient_accumulation_steps=2)
    model = names["Network"]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if made == "after prepare":
        model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = LambdaScheduler(model, schedules.dann(), 2, optimizer=optimizer)
    if made == "before prepare":
        model, optimizer = accelerator.prepare(model, optimizer)
    loader, prepared = accelerator.prepare(names["batches"], scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            accelerator.backward(model(*batch))
            optimizer.step()
            prepared.step()
    assert scheduler.last_step == 2 and prepared.get_last_lr() == [0.01]
    assert scheduler.get_last_lambda() == [schedules.dann()(1.0)]


def test_ignites_handler_leaves_lambda_to_the_optimizer():
    require("ignite")
    from ignite.engine import Engine, Events
    from ignite.handlers import LRScheduler

    names = run("ignite")
    model = names["Network"]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = LambdaScheduler(model, schedules.dann(), 16, optimizer=optimizer)

    def step(engine, batch):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()

    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_STARTED, LRScheduler(scheduler))
    trainer.run(names["batches"], max_epochs=4)
    assert scheduler.last_step == 16
    assert differing(names["whole"], model) == []


def test_skorchs_callback_steps_it_without_effect():
    require("skorch")
    from skorch.callbacks import LRScheduler

    names = run("skorch")
    made = []

    def policy(optimizer, last_epoch):
        made.append(LambdaScheduler(net.module_, schedules.dann(), 16, optimizer=optimizer))
        return made[-1]

    class Net(names["NeuralNet"]):
        get_loss = names["Net"].get_loss

    net = Net(
        *(names["Network"], nn.Module, torch.optim.Adam),
        lr=0.01,
        max_epochs=4,
        batch_size=16,
        train_split=None,
        verbose=0,
        callbacks=[LRScheduler(policy)],
    )
    net.fit(names["inputs"])
    assert [scheduler.last_step for scheduler in made] == [16]
    assert net.history[:, "event_lr"] == [0.01] * 4
    assert differing(names["whole"], net.module_) == []
