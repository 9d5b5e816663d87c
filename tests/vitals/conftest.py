"""Small downloads in the official layouts: what is not given is empty."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

HEADERS = {
    # eICU-CRD 2.0
    "patient": "patientunitstayid,patienthealthsystemstayid,gender,age,ethnicity,hospitalid,wardid,apacheadmissiondx,"
    "admissionheight,hospitaladmittime24,hospitaladmitoffset,hospitaladmitsource,hospitaldischargeyear,"
    "hospitaldischargetime24,hospitaldischargeoffset,hospitaldischargelocation,hospitaldischargestatus,unittype,"
    "unitadmittime24,unitadmitsource,unitvisitnumber,unitstaytype,admissionweight,dischargeweight,unitdischargetime24,"
    "unitdischargeoffset,unitdischargelocation,unitdischargestatus,uniquepid",
    "vitalPeriodic": "vitalperiodicid,patientunitstayid,observationoffset,temperature,sao2,heartrate,respiration,cvp,"
    "etco2,systemicsystolic,systemicdiastolic,systemicmean,pasystolic,padiastolic,pamean,st1,st2,st3,icp",
    "vitalAperiodic": "vitalaperiodicid,patientunitstayid,observationoffset,noninvasivesystolic,noninvasivediastolic,"
    "noninvasivemean,paop,cardiacoutput,cardiacinput,svr,svri,pvr,pvri",
    "diagnosis": "diagnosisid,patientunitstayid,activeupondischarge,diagnosisoffset,diagnosisstring,icd9code,"
    "diagnosispriority",
    # MIMIC-III 1.4
    "ICUSTAYS": "row_id,subject_id,hadm_id,icustay_id,dbsource,first_careunit,last_careunit,first_wardid,last_wardid,"
    "intime,outtime,los",
    "PATIENTS": "row_id,subject_id,gender,dob,dod,dod_hosp,dod_ssn,expire_flag",
    "CHARTEVENTS": "row_id,subject_id,hadm_id,icustay_id,itemid,charttime,storetime,cgid,value,valuenum,valueuom,"
    "warning,error,resultstatus,stopped",
    # MIMIC-IV 3.1
    "icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "icu/chartevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,"
    "warning",
}


@pytest.fixture
def download(tmp_path: Path) -> Callable[..., Path]:
    """Write a table, ``table(name, rows)``, into one folder, which is returned."""

    def table(
        name: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        ending: str = ".csv.gz",
        header: str | None = None,
        change: Callable[[str], str] = str,
    ) -> Path:
        columns = HEADERS[name].split(",")
        lines = [header or ",".join(columns)]
        for row in rows:
            assert set(row) <= set(columns), set(row) - set(columns)
            cells = (str(row.get(column, "")) for column in columns)
            lines.append(",".join(f'"{cell}"' if "," in cell else cell for cell in cells))
        text = change("\n".join(lines) + "\n").encode()
        folder = tmp_path / "download"
        path = folder / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text, mtime=0) if path.name.lower().endswith(".gz") else text)
        return folder

    return table
