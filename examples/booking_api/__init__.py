"""A web service that books trips: a seat, a room and the charge for both, or none of them.

    POST /trips                  {"flight": "SK4455", "hotel": "Bristol", "card": "4242424242424242"}
    POST /cards/{card}/approval  the customer approves a payment in their banking app
    GET  /trips/{saga_id}        what became of a trip

A trip is a saga, and the answer is its report: 201 when it was booked, 409 when that failed and everything is undone, 500 when something
needs a person. A client that hangs up while its trip is being booked cancels the saga, and what was booked is undone.

To see it fail: the card 4000000000000002 is declined; 4000000000003220 waits until it is approved, which is the time to hang up; and the
Hotel California takes no booking back, so a declined card leaves the trip stuck.

    python -m examples.booking_api     serves it on http://127.0.0.1:8000; needs fastapi and uvicorn

Read `app.py` first; `stages.py` is what a trip is made of, `bookings.py` is what the airline, the hotels and the bank have on file. The
sagas are kept in memory here: a service whose sagas have to outlive it gives its coordinator a durable ledger.
"""
