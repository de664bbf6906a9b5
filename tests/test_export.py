"""Exports: what diffusers draws with them is what our pipeline draws, call by call."""

import dataclasses
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

import ldm  # noqa: F401  (before anything that imports torchvision)
from ldm.cli import main
from ldm.errors import LdmError
from ldm.exchange import schedulers
from ldm.exchange.exporting import Model, plan, write_diffusers
from ldm.exchange.latents import folded
from ldm.inference.comparison import compared
from ldm.inference.pipeline import Pipeline
from ldm.inference.publishing import Wishes, export, push
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.training.diffusion import train_diffusion
from tests.published import PROMPT
from tests.recipes import tiny

diffusers = pytest.importorskip("diffusers")

ATTENDED = ("text.padding=attended", "train.steps=2", "run.save_every_steps=2")
FLOW = ("diffusion.process=rectified_flow", "diffusion.prediction=flow")
LAWS = {
    "sd eps": ("diffusion.process=sd", "diffusion.prediction=eps", "sample.sampler=dpmpp_2m"),
    "sd_zero_snr v": ("diffusion.process=sd_zero_snr", "diffusion.prediction=v"),
    "flow": (*FLOW, "sample.sampler=euler", "diffusion.timesteps.shift=2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs of the UNet with each law, on a VAE whose channels have their own statistics."""
    root = tmp_path_factory.mktemp("runs")
    vae = root / "vae"
    config = AutoencoderConfig(
        latent_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latents_mean=(0.3, -0.2, 0.05, 0.0),
        latents_std=(0.7, 1.4, 0.9, 1.1),
    )
    save_vae(vae, codec(config))
    made = {}
    for number, (name, law) in enumerate(LAWS.items()):
        run = root / f"run{number}"
        train_diffusion(
            tiny("unet", run, *ATTENDED, *law, f"vae.path={vae}", "cache.enabled=false")
        )
        made[name] = run
    return made


def codec(config, seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(config).eval().requires_grad_(False)


def save_vae(folder, vae):
    from ldm.checkpoint import save_module

    folder.parent.mkdir(exist_ok=True, parents=True)
    save_module(folder, dict(vae.state_dict()), vae.config.to_diffusers())


def model_of(pipeline):
    return Model(pipeline.vae, pipeline.encoder, pipeline.net, pipeline.contract)


@pytest.mark.parametrize("law", LAWS)
def test_diffusers_draws_what_we_draw(runs, law, tmp_path):
    """Untrained networks answer with numbers of order 1; ten steps in float32 keep 1e-4."""
    pipeline = Pipeline.from_pretrained(runs[law], device="cpu", cpu_kernels="plain")
    enliven(pipeline.net)
    exported = write_diffusers(tmp_path, model_of(pipeline))
    agreement = compared(tmp_path, pipeline, exported, PROMPT)
    assert len(agreement.calls) == 10
    assert agreement.values > 0.1, "a network that says nothing proves nothing"
    assert agreement.holds, "\n".join(agreement.lines())
    assert agreement.clock_rounding < 1


def enliven(net):
    """The last layer of a fresh UNet is 0: it has to say something to be compared."""
    torch.manual_seed(1)
    with torch.no_grad():
        net.conv_out.weight.normal_(std=0.05)


def test_a_difference_is_found(runs, tmp_path):
    pipeline = Pipeline.from_pretrained(runs["sd eps"], device="cpu", cpu_kernels="plain")
    enliven(pipeline.net)
    exported = write_diffusers(tmp_path, model_of(pipeline))
    with torch.no_grad():
        pipeline.net.mid_block.resnets[0].norm1.bias.add_(0.05)
    assert not compared(tmp_path, pipeline, exported, PROMPT).holds


def test_the_statistics_of_latents_fold_into_the_codec_exactly():
    """float32 weights of a folded 1x1 convolution leave 1e-5 of pixels near 1."""
    config = AutoencoderConfig(
        latent_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latents_mean=(0.5, -1.0, 2.0),
        latents_std=(0.2, 1.5, 3.0),
    )
    for before in (
        config,
        dataclasses.replace(config, use_quant_conv=False, use_post_quant_conv=False),
    ):
        vae = codec(before)
        for scale, shift in ((1.0, None), (0.18215, None), (1.5305, 0.0609)):
            plain = folded(vae, scale, shift)
            assert plain.config.latents_mean is None
            latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            assert_close(plain.decode(latents), vae.decode(latents), rtol=0, atol=1e-5)
            pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
            noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
            theirs, ours = (one.latents(one.moments(pixels), noise) for one in (plain, vae))
            assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_codec_with_that_scale_is_left_alone():
    vae = codec(AutoencoderConfig(block_out_channels=(32,), scaling_factor=0.18215))
    assert folded(vae, 0.18215, None) is vae


def test_the_command_writes_a_directory_a_card_and_the_figures(runs, tmp_path, capfd):
    out = tmp_path / "out"
    arguments = ["export", "--model", str(runs["flow"]), "--to", "diffusers", "--out", str(out)]
    assert main([*arguments, "--license", "mit", "--title", "Tiny", "--prompt", PROMPT]) == 0
    from huggingface_hub import ModelCard

    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.license == "mit"
    for said in ("rectified_flow", "![samples]", "![curves]", "batch_size", "DiffusionPipeline"):
        assert said in card.text
    assert (out / "samples.png").is_file()
    assert json.loads((out / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert "whole numbers" in capfd.readouterr().out
    assert main(arguments) == 2
    assert "is not empty" in capfd.readouterr().err


def test_the_code_of_the_card_runs(runs, tmp_path):
    said = export(str(runs["sd eps"]), tmp_path / "out", Wishes(verify=True, prompts=[PROMPT]))
    assert "agrees to 0.0001" in said
    assert "the code of README.md runs" in said
    text = (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "usage.py").read_text() in text
    assert not (tmp_path / "out" / "picture.png").exists()


def test_masked_padding_is_refused_with_the_fix(tmp_path):
    run = tmp_path / "run"
    train_diffusion(tiny("unet", run, "train.steps=2", "cache.enabled=false"))
    with pytest.raises(LdmError, match="padding") as refusal:
        export(str(run), tmp_path / "out", Wishes())
    assert "text.padding: attended" in refusal.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("process", ["vp_cosine", "edm", "interpolant", "sub_vp"])
def test_a_process_without_a_scheduler_is_refused_by_name(process):
    with pytest.raises(LdmError, match=process):
        schedulers.written(process, "v", "ddim", shift=1.0)


def test_a_prediction_without_a_scheduler_is_refused_by_name():
    with pytest.raises(LdmError, match="score"):
        schedulers.written("sd", "score", "ddim", shift=1.0)
    with pytest.raises(LdmError, match="prediction v"):
        schedulers.written("rectified_flow", "v", "ddim", shift=1.0)


def test_a_transformer_of_our_own_form_is_refused_with_what_can_be_done(tmp_path):
    run = tmp_path / "run"
    train_diffusion(tiny("dit", run, "train.steps=2", "cache.enabled=false"))
    pipeline = Pipeline.from_pretrained(run, device="cpu", cpu_kernels="plain")
    with pytest.raises(LdmError, match="diffusers has no class"):
        plan(model_of(pipeline))


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files talks to."""

    asked: list[str] = []
    sent = b""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Hub.asked.append(self.path)
        here = f"http://{self.headers['Host']}/me/tiny"
        answer = {"url": here, "id": "me/tiny"}
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **plain} for file in files]}
        if "/commit/main" in self.path:
            Hub.sent = body
            answer = {"commitUrl": f"{here}/commit/1", "commitOid": "1"}
            answer |= {"success": True, "hookOutput": ""}
        self._say(answer)

    def do_GET(self):
        Hub.asked.append(self.path)
        self._say({"id": "me/tiny", "sha": "0", "siblings": []})

    def _say(self, answer):
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def test_push_creates_a_repository_and_sends_the_files(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nhello card")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from pathlib import Path; from ldm.inference.publishing import push; "
        f"print(push(Path({str(tmp_path)!r}), 'me/tiny'))"
    )
    address = f"http://127.0.0.1:{server.server_port}"
    # in a process of its own: the Hub's client reads its settings when it is imported
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HOME": str(tmp_path), "PATH": ""},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "commit/1" in done.stdout
    assert any(path.endswith("/repos/create") for path in Hub.asked)
    assert b"README.md" in Hub.sent


def test_push_without_a_network_says_where_the_export_is(tmp_path):
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(LdmError, match="the export is at"):
        push(tmp_path, "me/tiny")


def test_front_matter_is_yaml(runs, tmp_path):
    export(str(runs["sd eps"]), tmp_path / "out", Wishes(prompts=[PROMPT]))
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(front)["tags"][0] == "text-to-image"
