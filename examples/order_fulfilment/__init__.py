"""A shop fulfils 1,000 orders, each as a saga over three databases, and then audits its books.

For each order: set the stock aside and authorise the payment, at the same time; capture the payment; ship the
parcel; issue the receipt. Some orders fail because of what they ask for, some because a fault is injected. Whatever happens,
an order ends wholly fulfilled or without a trace: not a cent, not an item out of place.

Read `stages.py` first: it is what one writes to use `saga`. Then:

    opening.py            what the shop has before the first order
    orders.py             what is ordered; orders.jsonl, written by make_orders.py
    database.py           one SQLite file, and the thread that works on it
    inventory.py          the stock
    bank.py               the money, by double entry
    carrier.py            the parcels
    faults.py             what can go wrong, at every stage
    fulfilment.py         runs the orders as sagas, so many at a time
    forecast.py           how each order has to end
    books.py, audit.py    what the databases say, and whether that and the reports are right
    progress.py, outcomes.py    what is shown
"""
