"""Presets: every one builds, overrides reach their field, and a project is made once and then found again."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import soundfile
import yaml

import lib.presets
from lib.agent import MaskingConfig
from lib.cascade import CascadeConfig
from lib.errors import UserError
from lib.presets import DEMO_SONGS, OBJECTIVE, PRESETS, UPPER_BAND, load_preset, open_project
from lib.synth import make_demo_dataset
from lib.train_config import NESTED, TrainConfig
from lib.variants import NAMED, VARIANTS

SMALL = {"clip_seconds": 1.0, "listen_seconds": 2.0, "pair_mode": "both"}


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("songs")
    make_demo_dataset(folder, num_songs=5, seconds=5)
    return folder


@pytest.fixture
def root(tmp_path, songs, monkeypatch) -> Path:
    """A repository of its own, with five songs of 5 s in `my songs é`."""
    monkeypatch.setattr(lib.presets, "ROOT", tmp_path)
    shutil.copytree(songs, tmp_path / "my songs é")
    return tmp_path


@pytest.fixture
def builds(monkeypatch) -> list[Path]:
    """The manifests that are really built, in order."""
    built, build = [], lib.presets.build_manifest

    def recorded(data, path, *args, **options):
        built.append(Path(path))
        return build(data, path, *args, **options)

    monkeypatch.setattr(lib.presets, "build_manifest", recorded)
    return built


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    preset = load_preset(name)
    assert preset.name == name
    assert isinstance(preset.cascade, CascadeConfig)
    assert isinstance(preset.train, TrainConfig)
    assert len(preset.cascade.stages) == 2
    assert all(stage.num_layers == preset.num_layers for stage in preset.cascade.stages)


def test_the_presets_are_those_of_the_design():
    smoke, demo, full = (PRESETS[name] for name in ("smoke", "demo", "full"))
    assert [p.codec for p in (smoke, demo, full)] == ["mdct", "mdct", "encodec"]
    assert [p.clip_seconds for p in (smoke, demo, full)] == [2, 4, 16]
    assert [p.num_layers for p in (smoke, demo, full)] == [2, 6, 6]
    assert demo.listen_seconds == full.listen_seconds == 16
    train = full.train
    assert (train.epochs, train.batch_size, train.learning_rate) == (200, 8, 1e-4)
    assert (train.weight_decay, train.clip, train.max_steps) == (0.01, 10.0, None)
    for preset in (smoke, demo, full):  # what is trained is the same; only how long and on what differs
        assert preset.masking == MaskingConfig("learned")
        assert preset.train.loss == OBJECTIVE
        assert preset.train.adversary.discriminator_learning_rate == 1e-4
        assert preset.train.agent_learning_rate > preset.train.learning_rate
        assert preset.train.ema


@pytest.mark.parametrize("name", PRESETS)
def test_no_warm_up_outlasts_its_preset(name):
    """Short presets must come to what their settings promise: a heard discriminator, the full learning rate, noise."""
    train = PRESETS[name].train
    if train.max_steps is not None:
        assert train.warmup_steps < train.max_steps / 2
        assert train.adversary.discriminator_warmup < train.max_steps / 2
        assert train.checkpoint_every <= train.max_steps


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("codec", "encodec", lambda p: p.codec),
        ("clip_seconds", 3.0, lambda p: p.clip_seconds),
        ("num_layers", 1, lambda p: p.cascade.stages[1].num_layers),
        ("num_stages", 3, lambda p: len(p.cascade.stages)),
        ("anti_cheating", 0.25, lambda p: p.cascade.anti_cheating),
        ("max_steps", 7, lambda p: p.train.max_steps),
        ("max_steps", None, lambda p: p.train.max_steps),
        ("clip", None, lambda p: p.train.clip),
        ("precision", "bf16", lambda p: p.train.precision),
        ("seed", 5, lambda p: p.train.seed),
        ("data_seed", 6, lambda p: p.data_seed),
        ("input_weight", 0.9, lambda p: p.train.loss.input_weight),
        ("window_seconds", None, lambda p: p.train.loss.window_seconds),
        ("anti_modulation", "log", lambda p: p.train.loss.anti_modulation),
        ("noise_rate", 0.02, lambda p: p.train.curriculum.noise_rate),
        ("target_shuffling", 0.5, lambda p: p.train.curriculum.target_shuffling),
        ("discriminator_every", 3, lambda p: p.train.adversary.discriminator_every),
        ("discriminator_spectral_norm", True, lambda p: p.train.adversary.discriminator_spectral_norm),
        ("masking", "energy", lambda p: p.masking.masking),
        ("hard_masks", True, lambda p: p.masking.hard_masks),
        ("patience", 2, lambda p: p.train.patience),
        ("accumulate", 2, lambda p: p.train.accumulate),
        ("agent_learning_rate", None, lambda p: p.train.agent_learning_rate),
        ("demo_every", 5, lambda p: p.demo_every),
    ],
)
def test_an_override_reaches_its_field_and_no_other(setting, value, found):
    changed, plain = load_preset("smoke", **{setting: value}), load_preset("smoke")
    assert found(changed) == value
    assert found(plain) != value

    def flat(preset):
        values = dataclasses.asdict(preset)
        train = values.pop("train")
        nested = [values.pop("masking"), *(train.pop(room) for room in NESTED)]
        return values | train | dict(item for room in nested for item in room.items())

    assert flat(changed) == flat(plain) | {setting: value}
    assert PRESETS["smoke"] == plain  # the table itself is never written to


def test_every_setting_has_one_room():
    """A name that is a field of two rooms would reach only one of them."""
    names = [f.name for f in dataclasses.fields(lib.presets.Preset) if f.name not in ("name", "train", "masking")]
    names += [f.name for f in dataclasses.fields(TrainConfig) if f.name not in NESTED]
    names += [f.name for room in (*NESTED.values(), MaskingConfig) for f in dataclasses.fields(room)]
    assert len(names) == len(set(names))
    for name in names:
        with pytest.raises(UserError, match=f"setting {name}="):  # each can be reached, and takes no list
            load_preset("smoke", **{name: [object]})


def test_numbers_are_taken_as_yaml_writes_them():
    assert isinstance(yaml.safe_load("1e-4"), str)  # YAML 1.1 wants a dot in it
    assert load_preset("smoke", learning_rate="1e-4").train.learning_rate == 1e-4
    clip = load_preset("smoke", clip=5).train.clip
    assert (clip, type(clip)) == (5.0, float)
    assert load_preset("smoke", clip="2.5").train.clip == 2.5


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("max_steps", True, "type int or none"),
        ("max_steps", 4.0, "type int or none"),
        ("max_steps", "4", "type int or none"),
        ("batch_size", None, "type int"),
        ("learning_rate", True, "type float"),
        ("learning_rate", "fast", "type float"),
        ("learning_rate", None, "type float"),
        pytest.param("learning_rate", 10**400, "type float", id="learning_rate-huge"),
        ("clip", "none", "type float or none"),
        ("codec", 1, "type str"),
        ("clip_seconds", [1], "type float"),
        ("seed", {}, "type int"),
        # of the right type, but no sense
        ("learning_rate", "nan", "finite number"),
        ("max_steps", 0, "whole number, 1 or more"),
        ("precision", "fp8", "use one of fp32, bf16"),
        ("clip_seconds", 0, "more than 0"),
        ("clip_seconds", ".nan", "type float"),
        ("listen_seconds", float("nan"), "more than 0"),
        ("listen_pairs", 0, "more than 0"),
        ("num_stages", 0, "1 or more"),
        ("num_layers", 0, "1 or more"),
        ("anti_cheating", -1, "0 or more"),
        ("input_weight", -0.3, "0 or more"),
        ("num_workers", 0, "1 or more"),
        ("patience", 0, "whole number, 1 or more, or none"),
        ("accumulate", 0, "whole number, 1 or more"),
        ("ema", 1, "from 0 to below 1"),
        ("schedule", "linear", "use one of constant, cosine"),
        ("masking", "loud", "use one of none, constant"),
        ("masking", "none", "overlap_weight needs masks"),
        ("hard_masks", 1, "type bool"),
        ("noise_ceiling", 1.5, "at most 1"),
        ("target_shuffling", -0.1, "0 or more"),
        ("gradient_penalty", "inf", "finite number"),
        ("discriminator_every", 0, "whole number, 1 or more"),
        ("discriminator_learning_rate", None, "adversarial_weight=0.05 needs a discriminator"),
        ("demo_every", 0, "more than 0"),
        ("judged_pairs", 0, "more than 0"),
    ],
)
def test_a_bad_value_names_the_setting_and_what_it_takes(setting, value, words):
    with pytest.raises(UserError) as caught:
        load_preset("smoke", **{setting: value})
    assert setting in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(UserError, match="preset: unknown 'big'; choose one of smoke, demo, full"):
        load_preset("big")
    for name in ("max_step", "train", "loss", "curriculum", "adversary", "name"):
        with pytest.raises(
            UserError, match=f"unknown '{name}'; choose from .*batch_size, .*hard_masks, .*input_weight, .*noise_rate"
        ):
            load_preset("demo", **{name: 1})


# --- the ablation's settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variants", "layers", "seeds", "steps", "batch_size", "val_pairs"),
    [
        ("smoke", NAMED, 1, 2, 10, 4, 8),
        ("demo", NAMED, 2, 3, 50, 4, 32),
        ("full", VARIANTS, 6, 5, 2000, 8, 64),
    ],
)
def test_the_plan_of_every_preset(name, variants, layers, seeds, steps, batch_size, val_pairs):
    plan = load_preset(name).plan
    assert plan.variants == variants
    assert (plan.num_layers, plan.seeds) == (layers, seeds)
    assert plan.train == TrainConfig(
        epochs=1_000_000,
        max_steps=steps,
        batch_size=batch_size,
        checkpoint_every=min(steps, 500),
        max_val_pairs=val_pairs,
    )
    assert plan.train.precision == "fp32"
    for variant in plan.variants:
        assert all(stage.num_layers == layers for stage in variant.cascade(plan.num_layers).stages)
        assert variant.training(plan.train).max_steps == steps


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("ablation_variants", "all", lambda p: [v.name for v in p.plan.variants]),
        ("ablation_layers", 3, lambda p: p.plan.num_layers),
        ("ablation_steps", 700, lambda p: (p.plan.train.max_steps, p.plan.train.checkpoint_every)),
        ("ablation_seeds", 4, lambda p: p.plan.seeds),
        ("ablation_batch_size", 3, lambda p: p.plan.train.batch_size),
        ("ablation_val_pairs", 5, lambda p: p.plan.train.max_val_pairs),
        ("ablation_clip_seconds", 0.5, lambda p: p.ablation_clip_seconds),
    ],
)
def test_an_override_of_the_ablation_reaches_the_plan(setting, value, found):
    wanted = {"ablation_variants": [v.name for v in VARIANTS], "ablation_steps": (700, 500)}.get(setting, value)
    changed, plain = load_preset("smoke", **{setting: value}), load_preset("smoke")
    assert found(changed) == wanted
    assert found(plain) != wanted
    assert changed.train == plain.train
    assert changed.cascade == plain.cascade


def test_settings_of_the_training_leave_the_ablation_alone():
    plain = load_preset("smoke").plan
    assert load_preset("smoke", max_steps=3, precision="bf16", learning_rate=1e-2, num_layers=3).plan == plain


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("data_seed", -1, "data_seed=-1 is not allowed; use a whole number, 0 or more"),
        ("ablation_variants", "some", "'some' is not allowed; use one of named, all"),
        ("ablation_seeds", 0, "1 or more"),
        ("ablation_layers", 0, "1 or more"),
        ("ablation_steps", 0, "1 or more"),
        ("ablation_steps", -3, "1 or more"),
        ("ablation_batch_size", 0, "1 or more"),
        ("ablation_val_pairs", 0, "1 or more"),
        ("ablation_clip_seconds", 0, "more than 0"),
        ("ablation_seeds", 2.5, "type int"),
        ("ablation_steps", None, "type int"),
    ],
)
def test_a_bad_setting_of_the_ablation_is_named(setting, value, words):
    with pytest.raises(UserError) as caught:
        load_preset("smoke", **{setting: value})
    assert setting in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- project ----------------------------------------------------------------------------------------------------------


def test_a_project_is_made_from_a_folder_of_songs(root):
    project = open_project(load_preset("smoke", **SMALL), "my songs é", "out/run 1")
    assert project.out_dir == root / "out" / "run 1"
    assert project.manifest.root == (root / "my songs é").resolve()
    assert project.manifest.clip_length == 24_000
    assert {pair.mode for pair in project.manifest.pairs} == {"continuation", "cross"}
    assert project.codec.name == "mdct"
    assert project.latents.index.is_relative_to(root / "data" / "latents")
    assert project.latents.pairs == {name: len(project.manifest.split(name)) for name in ("train", "val")}
    assert project.latents.encoded > 0
    assert {path.name for path in root.iterdir()} == {"my songs é", "out", "data"}  # nothing elsewhere


def test_relative_paths_are_taken_from_the_repository_whatever_the_working_directory(root, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    project = open_project(load_preset("smoke", **SMALL), "my songs é")
    assert project.out_dir == root / "outputs" / "smoke"
    assert not list((tmp_path / "elsewhere").iterdir())
    absolute = open_project(load_preset("smoke", **SMALL), root / "my songs é", tmp_path / "elsewhere" / "run")
    assert absolute.out_dir == tmp_path / "elsewhere" / "run"
    assert absolute.manifest.pairs == project.manifest.pairs


def test_without_data_the_demo_songs_are_made_in_the_repository(root, songs, monkeypatch):
    asked = []

    def copy(folder, num_songs, seed):
        asked.append((folder, num_songs, seed))
        shutil.copytree(songs, folder)

    monkeypatch.setattr(lib.presets, "make_demo_dataset", copy)
    for seed, name in ((0, "demo"), (3, "demo_seed3")):
        project = open_project(load_preset("smoke", **SMALL, data_seed=seed))
        assert asked.pop() == (root / "data" / name, DEMO_SONGS, seed)
        assert project.manifest.root == (root / "data" / name).resolve()


def test_another_data_seed_is_other_music(root, monkeypatch):
    make = lib.presets.make_demo_dataset
    monkeypatch.setattr(lib.presets, "make_demo_dataset", lambda *args, **options: make(*args, **options, seconds=5))
    monkeypatch.setattr(lib.presets, "DEMO_SONGS", 4)
    first, second = (open_project(load_preset("smoke", **SMALL, data_seed=seed)) for seed in (0, 1))
    hashes = [{clip.sha256 for pair in p.manifest.pairs for clip in (pair.input, pair.target)} for p in (first, second)]
    assert not hashes[0] & hashes[1]
    assert first.latents.index != second.latents.index


@pytest.mark.parametrize(("seed", "folder"), [(0, "demo_48k"), (2, "demo_48k_seed2")])
def test_generated_songs_have_an_upper_band_of_their_own(root, monkeypatch, songs, seed, folder):
    asked, project = [], open_project(load_preset("smoke", **SMALL, data_seed=seed), "my songs é")
    monkeypatch.setattr(lib.presets, "make_demo_dataset", lambda folder, **how: asked.append((folder, how)))
    monkeypatch.setattr(lib.presets, "read_library", lambda folder, clip_length: folder)
    assert project.upper_band() == (project.manifest.root, f"the music in {project.manifest.root}")
    assert not asked
    for name in ("demo", "demo_seed2", "demo_seed13"):
        manifest = dataclasses.replace(project.manifest, root=root / "data" / name)
        found = dataclasses.replace(project, manifest=manifest).upper_band()
        assert found == (root / "data" / folder, "generated songs")
        assert asked.pop() == (root / "data" / folder, {**UPPER_BAND, "seed": seed})
    for elsewhere in (root / "demo", root / "data" / "demo_seeds", root / "data" / "demo_48k"):
        manifest = dataclasses.replace(project.manifest, root=elsewhere)
        assert dataclasses.replace(project, manifest=manifest).upper_band()[0] == elsewhere


def test_super_resolution_is_trained_with_the_seed_of_training():
    for seed in (0, 5):
        preset = load_preset("smoke", seed=seed)
        for plan in (preset.superres, preset.recorded_superres):
            assert {c.seed for c in (plan.vae_training, plan.training, plan.vocoder_training)} == {seed}


def test_what_is_there_already_is_reused(root, builds):
    settings = load_preset("smoke", **SMALL)
    first = open_project(settings, "my songs é")
    again = open_project(settings, "my songs é")
    assert len(builds) == 1
    assert again.manifest == first.manifest
    assert (again.latents.encoded, again.latents.reused) == (0, first.latents.encoded)


def overwrite(folder: Path) -> None:
    """Another song under a name that is there: same size, later time."""
    wav, rate = soundfile.read(folder / "song_01.wav")
    soundfile.write(folder / "song_00.wav", wav, rate, subtype="PCM_16")


def add_in_a_linked_folder(folder: Path) -> None:
    shutil.copy(folder / "song_01.wav", folder.parent / "linked" / "new.wav")


CHANGES = {
    "added": lambda folder: shutil.copy(folder / "song_00.wav", folder / "a copy.WAV"),
    "removed": lambda folder: (folder / "song_00.wav").unlink(),
    "renamed": lambda folder: (folder / "song_00.wav").rename(folder / "other.wav"),
    "overwritten": overwrite,
    "added in a linked folder": add_in_a_linked_folder,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_manifest_is_built_anew_when_the_music_changes(root, builds, change):
    folder, linked = root / "my songs é", root / "linked"
    linked.mkdir()
    (folder / "more").symlink_to(linked)  # music is followed into links
    settings = load_preset("smoke", **SMALL)
    first = open_project(settings, folder).manifest
    CHANGES[change](folder)
    second = open_project(settings, folder).manifest
    assert len(builds) == 2
    assert second != first


@pytest.mark.parametrize("setting", [{"clip_seconds": 1.5}, {"pair_mode": "cross"}, {"data_seed": 1}])
def test_the_manifest_is_built_anew_when_a_setting_changes(root, builds, setting):
    first = open_project(load_preset("smoke", **SMALL), "my songs é").manifest
    second = open_project(load_preset("smoke", **SMALL | setting), "my songs é").manifest
    assert len(builds) == 2
    assert second != first
    open_project(load_preset("smoke", **SMALL | {"max_steps": 3, "codec": "mdct"} | setting), "my songs é")
    assert len(builds) == 2  # what the pairs do not depend on changes nothing


def test_the_manifest_is_built_anew_when_the_code_changes(root, builds, edit_code):
    for count, module in enumerate(("lib.pairs", "lib.manifest", "lib.audio"), start=1):
        open_project(load_preset("smoke", **SMALL), "my songs é")
        assert len(builds) == count
        edit_code(module)
    open_project(load_preset("smoke", **SMALL), "my songs é")
    edit_code("lib.latents")  # plays no part
    open_project(load_preset("smoke", **SMALL), "my songs é")
    assert len(builds) == 4


def test_a_kill_while_the_manifest_is_built_leaves_no_stale_stamp(root, monkeypatch):
    """Settings A, then B killed once its manifest was written, then A again: A's stamp must not vouch for B's."""
    first = open_project(load_preset("smoke", **SMALL), "my songs é").manifest

    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lib.presets, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            open_project(load_preset("smoke", **SMALL | {"clip_seconds": 1.5}), "my songs é")
    assert open_project(load_preset("smoke", **SMALL), "my songs é").manifest == first


def test_a_loop_of_links_in_the_music_ends(root):
    os.symlink("..", root / "my songs é" / "loop")
    assert open_project(load_preset("smoke", **SMALL), "my songs é").manifest.pairs


def test_listening_has_longer_clips_and_the_same_split(root, builds):
    project = open_project(load_preset("smoke", **SMALL), "my songs é")
    listening = project.listening()
    assert listening.clip_length == 48_000
    for split in ("train", "val"):
        short, long = (
            {clip.sha256 for pair in manifest.split(split) for clip in (pair.input, pair.target)}
            for manifest in (project.manifest, listening)
        )
        assert long
        assert long <= short
    assert [path.name for path in builds] == ["manifest.jsonl", "listening.jsonl"]
    project.listening()
    assert len(builds) == 2


@pytest.mark.parametrize(
    ("data", "out", "changes", "words"),
    [
        ("none", "", {}, "none: no such folder; check the path"),
        ("file", "", {}, "file: a file, not a folder"),
        ("empty", "", {}, "empty: no music in this folder"),
        ("my songs é", "file", {}, "file: cannot write here"),
        ("my songs é", "file/run", {}, "file/run: cannot write here"),
        ("my songs é", "/proc/run", {}, "/proc/run: cannot write here"),
        ("my songs é", "", {"codec": "lpc"}, "codec 'lpc': unknown; choose mdct or encodec"),
        ("my songs é", "", {"clip_seconds": 1000}, "no usable pair for"),
        ("my songs é", "", {"pair_mode": "all"}, "mode: unknown 'all'; choose one of"),
    ],
)
def test_what_a_project_cannot_be_made_of(root, data, out, changes, words):
    (root / "file").write_text("x")
    (root / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        open_project(load_preset("smoke", **SMALL | changes), data, out)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_output_folder_inside_the_music_is_refused(root):
    with pytest.raises(UserError, match="inside the data folder"):
        open_project(load_preset("smoke", **SMALL), "my songs é", "my songs é/out")
    assert not (root / "my songs é" / "out").exists()


def test_listening_clips_that_the_music_cannot_give_name_their_setting(root):
    project = open_project(load_preset("smoke", **(SMALL | {"listen_seconds": 500.0})), "my songs é")
    with pytest.raises(UserError, match="listen_seconds=500 is too long"):
        project.listening()


def test_a_record_that_lacks_what_the_notebooks_need_is_named(tmp_path, monkeypatch):
    record = json.loads((lib.presets.RECORD / "ablation.json").read_text())
    path = tmp_path / "ablation.json"
    monkeypatch.setattr(lib.presets, "RECORD", tmp_path)
    project = lib.presets.Project(load_preset("smoke"), tmp_path, None, None, None)
    with pytest.raises(UserError, match="no record of the ablation here"):
        project.grid()
    path.write_text(json.dumps(record))
    results, source = project.grid()
    assert len(results) == len(record["results"])
    assert source == "recorded: preset demo, 100 steps, codec mdct"
    few = [row for row in record["results"] if row["variant"] != "final 2-stage"]
    for broken, what in (
        (record | {"results": few}, "final 2-stage"),
        (record | {"facts": {}}, "codec, preset, steps"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=rf"ablation\.json: lacks {what}; restore"):
            project.grid()
