//! Line pointers and the tuples behind them: what page functions of all access methods do to a page (`storage/itemid.h`, `page/bufpage.c`).
