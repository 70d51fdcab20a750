"""Reads a sampler.onnx and draws samples, from docs/onnx-format.md alone, with numpy and onnxruntime.

    python docs/onnx_reader.py sampler.onnx 16 samples.npy

An example for whoever writes a reader in another language. Sections of the page are named in the comments.
"""

import base64
import json
import sys

import numpy as np
import onnxruntime

PREFIX = "ray_ddpm."
COLUMNS = ["a", "b", "c", "d", "e", "f", "s", "lo", "hi"]  # of version 1; version 2 writes its own
EXTRA_COLUMNS = ["e2", "g"]
PARTS = ["data", "schedule", "prediction_type", "sampler", "provenance"]
EXTRA_PARTS = ["noise_level", "conditions"]


def read(path):
    """The session, the metadata and the default table of a file. Sections "Metadata" and "What to refuse"."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    entries = session.get_modelmeta().custom_metadata_map
    version = entries.get(PREFIX + "format_version")
    if version not in ("1", "2"):
        raise SystemExit(f"{path}: format version {version} is not known")
    spec = json.loads(entries[PREFIX + "spec"])
    columns = json.loads(entries[PREFIX + "columns"]) if version == "2" else COLUMNS
    parts = PARTS + (EXTRA_PARTS if version == "2" else [])
    unknown = [name for name in columns if name not in COLUMNS + EXTRA_COLUMNS]
    unknown += [name for name in spec if name not in parts]
    if unknown:
        raise SystemExit(f"{path}: {', '.join(unknown)} is not known")
    rows = decode(entries[PREFIX + "table"], "<f8").reshape(-1, len(columns))
    table = {name: rows[:, place] for place, name in enumerate(columns)}
    if not all(np.isfinite(table[name]).all() for name in columns if name not in ("lo", "hi")):
        raise SystemExit(f"{path}: the table is not finite")
    table["alphas_cumprod"] = decode(entries[PREFIX + "alphas_cumprod"], "<f8")
    if "noise_level" in spec:
        table["noise_level"] = decode(entries[PREFIX + "noise_levels"], "<f8")
    else:
        table["timestep"] = decode(entries[PREFIX + "timesteps"], "<i8")
    return session, spec, table


def decode(text, dtype):
    """Base64 of a little-endian array in C order."""
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def spaced_timesteps(log_snr, num_steps, spacing):
    """Timesteps of a sampler with fewer steps, noisy first. Section "Spacings"."""
    total, index = len(log_snr), np.arange(num_steps)
    if spacing == "leading":
        rising = index * (total // num_steps)
    elif spacing == "trailing":
        rising = np.round(total - index[::-1] * (total / num_steps)) - 1
    elif num_steps == 1:
        rising = np.array([total - 1])
    elif spacing == "linspace":
        rising = np.round(np.linspace(0, total - 1, num_steps))
    else:
        falling = np.maximum(log_snr, -10.0)
        if spacing == "karras":
            targets = -14.0 * np.log(np.linspace(*np.exp(falling[[0, -1]] / -14.0), num_steps))
        else:  # logsnr
            targets = np.linspace(falling[0], falling[-1], num_steps)
        nearest = np.abs(falling[None, :] - targets[:, None]).argmin(axis=1)
        rising = np.minimum(np.maximum.accumulate(nearest - index) + index, total - num_steps + index)
        rising[-1] = total - 1
    return rising[::-1].astype(np.int64)


def build_table(spec, sampler, num_steps, eta=None, spacing="logsnr"):
    """The table of another sampler than the file's own. Section "Samplers"."""
    if eta is None:
        eta = 0.25 if sampler == "heun_churn" else 0.0
    betas = np.array(spec["schedule"]["betas"])
    with np.errstate(divide="ignore"):  # minus infinity where alphas_cumprod is 0
        log_alphas_cumprod = np.cumsum(np.log1p(-betas))
    log_snr = log_alphas_cumprod - np.log(-np.expm1(log_alphas_cumprod))
    alphas_cumprod = np.cumprod(1.0 - betas)
    timesteps = spaced_timesteps(log_snr, num_steps, spacing)
    if sampler in ("heun", "heun_churn"):
        timesteps, after, corrected = heun_rows(
            alphas_cumprod, log_snr, timesteps, eta if sampler == "heun_churn" else 0.0
        )
    else:
        after = np.append(alphas_cumprod[timesteps[1:]], 1.0)  # alphas_cumprod after each row
    at = alphas_cumprod[timesteps]  # and before it
    if spec["prediction_type"] == "epsilon" and at[0] == 0.0:
        raise SystemExit("alphas_cumprod reaches 0, where noise does not determine x0")
    a, b = {
        "epsilon": (1.0 / np.sqrt(at), -np.sqrt((1.0 - at) / at)),
        "sample": (np.zeros_like(at), np.ones_like(at)),
        "v_prediction": (np.sqrt(at), -np.sqrt(1.0 - at)),
    }[spec["prediction_type"]]
    zero = np.zeros_like(at)
    beta = 1.0 - at / after
    beta_tilde = beta * (1.0 - after) / (1.0 - at)
    e, e2, s = zero.copy(), zero.copy(), zero.copy()
    if sampler in ("ddpm", "dpmpp_2m_sde"):
        c = np.sqrt(after) * beta / (1.0 - at)
        d = np.sqrt(at / after) * (1.0 - after) / (1.0 - at)
        has_beta = sampler == "ddpm" and spec["sampler"]["variance"] == "beta"
        s = np.sqrt(beta if has_beta else beta_tilde)
    else:
        s = eta * np.sqrt(beta_tilde) if sampler == "ddim" else s
        d = np.sqrt(np.maximum(1.0 - after - s**2, 0.0)) / np.sqrt(1.0 - at)
        c = np.sqrt(after) - d * np.sqrt(at)
    if sampler in ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m"):
        weight, h = np.zeros_like(at), np.diff(log_snr[timesteps])
        ratio = h[1:] / h[:-1]
        weight[1:-1] = np.where(ratio > 3.0, 0.0, ratio / 2.0)  # first order after a step too short
        c, e = c * (1.0 + weight), -c * weight
    if sampler == "dpmpp_3m":
        for i in range(2, num_steps - 1 - (num_steps < 15)):
            if ratio[i - 1] <= 3.0 and ratio[i - 2] <= 3.0:
                c[i], e[i], e2[i] = np.sqrt(after[i]) * third_order(h[i], h[i - 1], h[i - 2])
    if sampler in ("heun", "heun_churn"):
        c[1::2], d[1::2], e[1::2], s[1::2] = corrected
    lo, hi = spec["sampler"]["clip"] or (-np.inf, np.inf)
    table = dict(a=a, b=b, c=c.copy(), d=d.copy(), e=e.copy(), f=zero.copy(), s=s.copy(), e2=e2)
    for name in ("c", "d", "e", "e2", "f", "s"):
        table[name][-1] = float(name == "c")  # the last row returns x0
    if sampler == "ddpm" and spec["sampler"]["variance"] == "learned":
        table["g"] = zero.copy()
        table["s"][:-1] = np.sqrt(np.sqrt(beta_tilde * beta))[:-1]
        table["g"][:-1] = 0.25 * np.log(beta[:-1] / beta_tilde[:-1])
    table |= {"lo": np.full_like(at, lo), "hi": np.full_like(at, hi), "alphas_cumprod": np.append(at, 1.0)}
    if "noise_level" not in spec:
        return table | {"timestep": timesteps}
    if at[0] == 0.0:
        raise SystemExit(f"{spec['noise_level']} is infinite where alphas_cumprod is 0")
    sigma = np.sqrt((1.0 - at) / at)
    return table | {"noise_level": sigma if spec["noise_level"] == "sigma" else log_snr[timesteps]}


def third_order(step, step_before, step_before_that):
    """c, e and e2, each without the factor sqrt(A_s), from steps of log_snr. Section "Order 3"."""
    h, r_1, r_2 = step / 2.0, step_before / step, step_before_that / step
    p_1 = -np.expm1(-h)
    p_2 = 1.0 - p_1 / h
    p_3 = 1.0 - 2.0 * p_2 / h
    q = (r_1 * p_2 + p_3) / (r_1 + r_2)
    u, v = (p_2 + q) / r_1, q / r_2
    return np.array([p_1 + u, -(u + v), v])


def heun_rows(alphas_cumprod, log_snr, visited, eta):
    """Timesteps, alphas_cumprod after each row, and (c, d, e, s) of the odd rows. Section "Heun"."""
    start = visited.copy()
    for i in range(1, len(visited) - 1):
        raised = log_snr[visited[i]] - 2.0 * np.log1p(eta * (np.sqrt(2.0) - 1.0))
        start[i] = np.abs(log_snr - raised).argmin()
    signal, end = np.sqrt(alphas_cumprod[visited[1:]]), log_snr[visited[1:]]
    rho = np.exp((end - log_snr[start[:-1]]) / 2.0)
    w = np.where(rho > 3.0, 0.0, signal * (rho - 1.0) / 2.0)
    kept = alphas_cumprod[start[1:]] / alphas_cumprod[visited[1:]]
    k = np.sqrt(kept)
    timesteps = np.empty(2 * len(visited) - 1, dtype=np.int64)
    timesteps[0::2], timesteps[1::2] = start, visited[1:]
    after = np.append(alphas_cumprod[timesteps[1:]], 1.0)
    return timesteps, after, (k * w, k, -k * w, np.sqrt(1.0 - kept))


def threefry(key0, key1, x0, x1):
    """Threefry 2x32 with 20 rounds on uint32 arrays. Section "Noise"."""
    keys = (key0, key1, key0 ^ key1 ^ np.uint32(0x1BD11BDA))
    with np.errstate(over="ignore"):
        x0, x1 = x0 + key0, x1 + key1
        for group in range(5):
            for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
                x0 = x0 + x1
                x1 = ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))) ^ x0
            x0 = x0 + keys[(group + 1) % 3]
            x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def noise(seed, indices, k, shape):
    """Standard normal noise, float64 [len(indices), *shape]. Section "Noise"."""
    size = int(np.prod(shape))
    pair = np.arange((size + 1) // 2, dtype=np.uint32)[None, :]
    index = np.asarray(indices).astype(np.uint32)[:, None]
    ones = np.ones_like(index * pair)
    w0, w1 = threefry(np.uint32(seed % 2**32) * ones, index * ones, np.uint32(k) * ones, pair * ones)
    radius = np.sqrt(-2.0 * np.log((w0 + 0.5) / 2.0**32))
    theta = 2.0 * np.pi * (w1 + 0.5) / 2.0**32
    values = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=-1).reshape(len(index), -1)
    return values[:, :size].reshape(len(index), *shape)


def runs(num_rows, first, rows_per_step, resampling, jump_length):
    """(row, repetition, row from whose start x jumps back or None) of each run. Section "Known values"."""
    rows_per_block = rows_per_step * jump_length
    for begin in range(first, num_rows - 1, rows_per_block):
        end = min(begin + rows_per_block, num_rows - 1)
        for repetition in range(resampling):
            for row in range(begin, end):
                yield row, repetition, end if repetition and row == begin else None
    yield num_rows - 1, 0, None


def sample(
    session, spec, table, num_samples, seed=0, labels=None, guidance_scale=None, conditions=None,
    known=None, unknown=None, resampling=1, jump_length=1, start=None, strength=1.0, num_steps=None,
):  # fmt: skip
    """Samples in data units, float32 [num_samples, *shape]. Sections "The update" to "Known values".

    `labels` are numbers of classes, one per sample. `conditions` are arrays by name, one row per sample.
    `known` and `start` are in data units and `unknown` is 1 or 0, each [num_samples, *shape] or [*shape].
    `num_steps` is that of the table; None: that of the file's own.
    """
    shape, indices = tuple(spec["data"]["shape"]), np.arange(num_samples)
    mean, std = np.array(spec["data"]["mean"]), np.array(spec["data"]["std"])
    classes = spec["data"].get("classes") or []
    scale = spec["sampler"]["guidance_scale"] if guidance_scale is None else guidance_scale
    if classes and labels is None:
        labels = indices % len(classes)
    extra = {}
    for each in spec.get("conditions", []):
        if each["name"] not in (conditions or {}):
            raise SystemExit(f"the model needs the condition {each['name']} of shape {each['shape']}")
        value = (conditions[each["name"]] - np.array(each["mean"])) / np.array(each["std"])
        extra[f"condition_{each['name']}"] = value.astype(np.float32)
    outputs = ["model_output"] + (["variance"] if "g" in table else [])

    def call(x, row, y):
        inputs = {"x": x.astype(np.float32)}
        if "timestep" in table:
            inputs["t"] = np.full(num_samples, table["timestep"][row], dtype=np.int64)
        else:
            inputs[spec["noise_level"]] = np.full(num_samples, table["noise_level"][row], dtype=np.float32)
        if y is not None:
            inputs["y"] = y.astype(np.int64)
        out, *variance = session.run(outputs, inputs | extra)
        return out.astype(np.float64), variance[0].astype(np.float64) if variance else 0.0

    levels, num_rows = table["alphas_cumprod"], len(table["a"])
    num_steps = num_steps or spec["sampler"]["num_steps"]
    rows_per_step = max(1, (num_rows - 1) // (num_steps - 1)) if num_steps > 1 else 1
    table, first = {name: values.copy() for name, values in table.items()}, 0
    x = noise(seed, indices, 0, shape)
    if start is not None:
        num_steps = (num_rows - 1) // rows_per_step + 1
        first = (num_steps - max(1, round(strength * num_steps))) * rows_per_step
        x = np.sqrt(levels[first]) * ((start - mean) / std) + np.sqrt(1.0 - levels[first]) * x
    if first > 0:  # x0_previous is missing
        table["c"][first] += table["e"][first] + table.get("e2", np.zeros(num_rows))[first]
        table["e"][first] = 0.0
        if "e2" in table:
            table["e"][first + 1 : first + 2] += table["e2"][first + 1 : first + 2]
            table["e2"][first : first + 2] = 0.0

    def inject(x, level, k):
        if known is None:
            return x
        noisy = (np.asarray(known) - mean) / std
        if level < 1.0:
            noisy = np.sqrt(level) * noisy + np.sqrt(1.0 - level) * noise(seed, indices, 2**31 + k, shape)
        return np.where(unknown, x, noisy)

    x = inject(x, levels[first], first)
    x0 = x0_previous = x0_previous_2 = np.zeros_like(x)
    for i, j, jump in runs(num_rows, first, rows_per_step, resampling, jump_length):
        k = i + 1 + j * 2**20
        row = {"e2": 0.0, "g": 0.0} | {name: values[i] for name, values in table.items()}
        if jump is not None:
            ratio = levels[i] / levels[jump]
            fresh = noise(seed, indices, 2**31 + 2**30 + k, shape)
            x = np.sqrt(ratio) * x + np.sqrt(1.0 - ratio) * fresh
        out, variance = call(x, i, None if not classes else np.asarray(labels))
        if classes and scale != 1.0:
            null, _ = call(x, i, np.full(num_samples, len(classes)))
            out = null + scale * (out - null)
        z = noise(seed, indices, k, shape) if row["s"] else 0.0
        x0_previous, x0_previous_2 = x0, x0_previous
        x0 = np.clip(row["a"] * x + row["b"] * out, row["lo"], row["hi"])
        x = (
            row["c"] * x0
            + row["d"] * x
            + row["e"] * x0_previous
            + row["e2"] * x0_previous_2
            + row["f"] * out
            + row["s"] * np.exp(row["g"] * variance) * z
        )
        x = inject(x, levels[i + 1], k)
    data = x * std + mean
    if spec["data"]["range"]:
        data = data.clip(*spec["data"]["range"])
    if known is not None:
        data = np.where(unknown, data, known)
    return data.astype(np.float32)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    file, count, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    np.save(output, sample(*read(file), count))
    print(f"{output}: {count} samples")
