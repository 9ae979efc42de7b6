"""FedGraft's strategy in anybody's own Flower app: nothing else here is FedGraft's.

A small PyTorch model with a PEFT adapter, a ClientApp and a ServerApp as Flower's own examples
write them, and three lines that let LoRA-FAIR combine the adapters. Run it with

    python docs/examples/flower_app.py

which carries the messages in this process, or name `app` and `client` as the components of a Flower
app and use `flwr run`.
"""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from strategies.strategy import AdapterStrategy

ROUNDS, STEPS, CLIENTS = 5, 20, 4


def build_model() -> nn.Module:
    """Return the same base with a LoRA adapter on every call."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))


def data_of(client: int) -> tuple[Tensor, Tensor]:
    """Return one client's inputs (64, 8) and targets (64, 1): each sees a shifted input."""
    generator = torch.Generator().manual_seed(client)
    inputs = torch.randn(64, 8, generator=generator) + 0.5 * client
    return inputs, torch.sin(inputs.sum(dim=1, keepdim=True))


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapter that arrived, and send it back."""
    model = build_model()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    inputs, targets = data_of(int(context.node_config["partition-id"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"num-examples": len(inputs), "loss": loss.item()}),
        }
    )
    return Message(content, reply_to=message)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and say how the training loss went."""
    arrays = ArrayRecord(get_peft_model_state_dict(build_model()))
    strategy = AdapterStrategy("lora-fair", scaling=2.0, clients=CLIENTS, evaluate_every=0)
    result = strategy.start(grid, arrays, num_rounds=ROUNDS)
    for round, metrics in result.train_metrics_clientapp.items():
        print(f"round {round}: mean training loss {metrics['loss']:.3f}")


if __name__ == "__main__":
    from simulations.in_process import InProcessGrid

    app(InProcessGrid(client, CLIENTS, {}), Context(1, 1, {}, RecordDict(), {}))
