"""The field ``filter`` of requests: values that items must have in fields of the items table."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

#: A value of an item's field; whole numbers that float64 holds exactly.
FieldValue = (
    StrictBool
    | Annotated[StrictInt, Field(ge=-(2**53), le=2**53)]
    | Annotated[StrictFloat, Field(allow_inf_nan=False)]
    | Annotated[StrictStr, Field(max_length=4096)]
)
FieldName = Annotated[StrictStr, Field(min_length=1, max_length=256)]
FieldFilter = Annotated[
    dict[FieldName, FieldValue | Annotated[list[FieldValue], Field(min_length=1)]],
    Field(
        max_length=16,
        description="recommend only items that have this value, or one of these values, in every field named here; "
        "`item_fields` of `/v1/models` lists the fields",
    ),
]
