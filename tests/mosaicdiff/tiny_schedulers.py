"""Schedulers as the families' pipelines have them."""

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**_DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**_DIFFUSION)


def dpm() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


def flow_euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def flow_dynamic() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def flow_heun() -> FlowMatchHeunDiscreteScheduler:
    return FlowMatchHeunDiscreteScheduler(shift=3.0)


def flow_unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def flow_dpm() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
