from gluonts_peft.testing import adapter_checks, backbone_checks, estimator_checks, parametrize_with_checks
from gluonts_peft_fracast import FracastBackbone, FracastEstimator


def fracast():
    return FracastBackbone.from_checkpoint("fracast-0", prediction_length=8, context_length=96)


CHECKS = [
    *backbone_checks(fracast),
    *adapter_checks("lora", fracast),
    *estimator_checks(FracastEstimator, context_length=96),
]


@parametrize_with_checks(CHECKS)
def test_contract(check):
    check()
