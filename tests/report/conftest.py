import pytest
from report_cases import random_case


@pytest.fixture(params=range(12))
def case(request):
    return random_case(request.param)
